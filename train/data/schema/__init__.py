"""Schema inference: the kind of each column of a source, and options to train on it."""
