"""Hyperparameter search over training options. Each trial is a run of the training loop."""
