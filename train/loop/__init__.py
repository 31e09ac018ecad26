"""The training loop and its parts. One loop, whatever the task, the workers and the device."""
