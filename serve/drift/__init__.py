"""Drift monitoring: samples of the traffic, windows of samples, and drift statistics."""
