"""Networks that name their sites, found by the registry by the `name` of the class."""
