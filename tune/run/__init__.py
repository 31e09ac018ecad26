"""Running a study: sampling, scheduling, trials, and their state on disk."""
