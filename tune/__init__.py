"""Tuning: a search over training options, whose trials go through the training loop."""
