"""What a model is about: how a record becomes arrays, and outputs become a prediction.

No torch. The same code runs in training, behind HTTP and offline, and its state travels in the
bundle as JSON.
"""

from train.metrics import Metric
from train.tasks.categorical import Categories
from train.tasks.classification import ClassTarget
from train.tasks.features import KINDS, Encoder, Features
from train.tasks.image import Images
from train.tasks.multilabel import LabelsTarget
from train.tasks.numeric import Numbers
from train.tasks.records import Arrays, Columns, InvalidRecord, Record, TensorSpec
from train.tasks.regression import ValueTarget
from train.tasks.targets import NamedTarget, Target
from train.tasks.task import TARGETS, Task
from train.tasks.text import Texts

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
    "Record",
    "Target",
    "Task",
    "TensorSpec",
    "Texts",
    "ValueTarget",
]
