"""What decides for all replicas: the model repository and autoscaling."""
