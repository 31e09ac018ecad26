"""Kinds of columns: how each becomes arrays."""
