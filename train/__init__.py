"""Training: tasks, data, nets, the loop, compression, and the bundle they end in."""
