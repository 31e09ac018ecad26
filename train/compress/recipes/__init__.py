"""Compression recipes: the ways to build a variant of a trained network."""
