"""Encoders for the kinds of columns."""
