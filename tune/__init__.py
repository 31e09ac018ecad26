"""Hyperparameter search over training options. Each trial is a run of the training loop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune.config import StudyConfig
    from tune.tuner import StudyResult, tune

__all__ = ["StudyConfig", "StudyResult", "tune"]


def __getattr__(name: str) -> Any:
    # Lazy, because the report of a study needs neither PyTorch nor Ray.
    if name in ("StudyResult", "tune"):
        from cluster import connect

        # Before Ray is imported, which reads it then.
        connect.set_ray_environment()
        from tune import tuner

        return getattr(tuner, name)
    if name == "StudyConfig":
        from tune.config import StudyConfig

        return StudyConfig
    raise AttributeError(f"module 'tune' has no attribute '{name}'")
