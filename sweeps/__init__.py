"""Suites, their runs, and how they are launched."""
