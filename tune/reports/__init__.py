"""Reports on a study: progress, plots, and records in MLflow."""
