"""What every method and data set shares. It knows no method and no data set by name, and imports no other room."""
