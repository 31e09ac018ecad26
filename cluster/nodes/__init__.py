"""Functions that run on every node of a cluster, and their results."""
