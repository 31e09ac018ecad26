"""Metrics, the access log and traces."""
