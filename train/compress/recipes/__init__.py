"""The recipes of compression: one module for each way to make a variant."""
