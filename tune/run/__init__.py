"""A study while it runs: sampling, scheduling, trials, and their state on disk."""
