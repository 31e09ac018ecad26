"""Offline inference: `python -m serve.offline` predicts all records of a source."""
