"""Configs that are shipped, and in curves.py an example of a task of one's own."""
