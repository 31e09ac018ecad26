"""Offline inference: `python -m serve.offline` writes predictions for all records of a source."""
