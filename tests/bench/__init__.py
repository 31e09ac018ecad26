"""Comparisons: each measures its candidates in turns, in one run, and prints their ratio."""
