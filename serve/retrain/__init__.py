"""Retraining on logged requests with feedback: `python -m serve.retrain`."""
