"""Training: tasks, data, nets, the loop, compression, and the bundle they end in."""

from cluster import private

# Before the libraries that read it are imported, in every process that uses them.
private.set_privacy_environment()
