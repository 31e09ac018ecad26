"""Tasks: how records become arrays, and how a network's outputs become predictions.

The same code runs in training, in the server and in offline inference; its state is stored in the
bundle as JSON. It does not import torch.
"""

from train.metrics import Metric
from train.tasks.classification import ClassTarget
from train.tasks.columns.categorical import Categories
from train.tasks.columns.image import Images
from train.tasks.columns.numeric import Numbers
from train.tasks.columns.text import Texts
from train.tasks.features import KINDS, Encoder, Features
from train.tasks.multilabel import LabelsTarget
from train.tasks.regression import ValueTarget
from train.tasks.targets import NamedTarget, Target
from train.tasks.task import TARGETS, Task
from train.tasks.tensors import RawOutputs, Tensors
from train.values.records import Arrays, Columns, InvalidRecord, Record, TensorSpec

__all__ = [
    "KINDS",
    "TARGETS",
    "Arrays",
    "Categories",
    "ClassTarget",
    "Columns",
    "Encoder",
    "Features",
    "Images",
    "InvalidRecord",
    "LabelsTarget",
    "Metric",
    "NamedTarget",
    "Numbers",
    "RawOutputs",
    "Record",
    "Target",
    "Task",
    "TensorSpec",
    "Tensors",
    "Texts",
    "ValueTarget",
]
