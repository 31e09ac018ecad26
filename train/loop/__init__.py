"""The training loop and its parts: one loop for all tasks, numbers of workers and devices."""
