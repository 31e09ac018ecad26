"""Studies that are shipped."""
