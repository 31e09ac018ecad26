"""The control plane of all replicas of a model: the model repository and autoscaling."""
