"""What a net learns from besides the records: weights to start from, and a teacher.

Shapes: B batch, K outputs.
"""

import safetensors.torch
import torch
from torch import Tensor, nn

from cluster import storage
from train import nets
from train.bundle.bundle import WEIGHTS
from train.config import Net
from train.loop.parallel import Worker
from train.loop.run import Lesson
from train.nets import fake_quant
from train.nets.losses import distillation
from train.tasks import Task


def start(net: nn.Module, lesson: Lesson) -> bool:
    """Give a net the weights to start from; return whether there are any."""
    if lesson.start is not None:
        nets.resize(net, _weights(lesson.start))
    if lesson.quantized:
        fake_quant.install(net)
    return lesson.start is not None


class Teacher:
    """A trained net whose outputs are learned beside the targets."""

    def __init__(self, lesson: Lesson, task: Task, worker: Worker) -> None:
        assert lesson.teacher is not None
        net = nets.build(Net.model_validate(lesson.teacher_net), task)
        nets.resize(net, _weights(lesson.teacher))
        # Its buffers must not follow the batches, so it is not a part of the net that learns.
        self._net = nets.folded(net).to(worker.device).requires_grad_(False)
        self._share = lesson.share
        self._loss = distillation(task.target, lesson.temperature)

    def blended(self, loss: Tensor, inputs: list[Tensor], outputs_BK: Tensor) -> Tensor:
        """The loss against the targets with that against the teacher, by their shares."""
        with torch.no_grad():
            taught_BK = self._net(*inputs).float()
        return (1 - self._share) * loss + self._share * self._loss(outputs_BK, taught_BK)


def _weights(url: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(storage.fetch(url, last=WEIGHTS) / WEIGHTS)
