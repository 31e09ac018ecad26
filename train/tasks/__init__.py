"""What a model is about: how a record becomes arrays, and outputs become a prediction.

numpy only. The same code runs in training, behind HTTP and offline, and its state travels in the
bundle as JSON.
"""

from train.tasks.features import Features, ImageFeatures
from train.tasks.records import Arrays, InvalidRecord, Record, TensorSpec
from train.tasks.targets import ClassTarget, Target
from train.tasks.task import Task

__all__ = [
    "Arrays",
    "ClassTarget",
    "Features",
    "ImageFeatures",
    "InvalidRecord",
    "Record",
    "Target",
    "Task",
    "TensorSpec",
]
