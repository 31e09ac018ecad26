"""Benchmarks: each measures its candidates alternately in one run and prints their ratio."""
