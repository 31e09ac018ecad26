"""Studies that are part of the package."""
