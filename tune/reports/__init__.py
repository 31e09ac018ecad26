"""What a study shows: progress, plots, and records in MLflow."""
