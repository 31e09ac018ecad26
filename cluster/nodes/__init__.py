"""Questions to the nodes of a cluster, asked from the head."""
