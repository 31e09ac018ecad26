"""Training: tasks, data, networks, the training loop, compression and bundles."""

from cluster import private

# Set before the libraries that read these variables are imported, in every process.
private.set_privacy_environment()
