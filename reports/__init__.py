"""Every table and figure, from the store alone."""
