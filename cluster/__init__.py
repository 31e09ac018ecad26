"""Ray clusters and storage: the lowest layer, which imports no other package of this project."""
