"""Methods: one file each, found by the registry by the `name` of the class."""
