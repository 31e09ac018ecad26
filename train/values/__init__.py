"""Values: what records hold, as files and clients write it, and when two values are the same."""
