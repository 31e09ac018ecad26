"""Data for training: where records come from, their order, and how images are varied."""
