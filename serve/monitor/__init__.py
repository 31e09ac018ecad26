"""What happens after deployment: drift, the request log, feedback, candidates, retraining."""
