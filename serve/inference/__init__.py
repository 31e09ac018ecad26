"""Prediction from decoded inputs: batching, admission, caching and the latency model."""
