"""Training: tasks, data, networks, the training loop, compression and bundles."""

from typing import TYPE_CHECKING, Any

from cluster import private

if TYPE_CHECKING:
    from train.config import Config
    from train.training import fit

__all__ = ["Config", "fit"]

# Set before the libraries that read these variables are imported, in every process.
private.set_privacy_environment()


def __getattr__(name: str) -> Any:
    # Lazy, because bundles are loaded and served without PyTorch.
    if name == "fit":
        from cluster import connect

        # Before Ray is imported, which reads it then.
        connect.set_ray_environment()
        from train.training import fit

        return fit
    if name == "Config":
        from train.config import Config

        return Config
    raise AttributeError(f"module 'train' has no attribute '{name}'")
