"""Drift monitoring: samples of the traffic, windows of them, and their statistics."""
