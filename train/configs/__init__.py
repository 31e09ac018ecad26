"""Example configs, and in curves.py and curve_net.py a custom task with its own network."""
