"""Sources of learning in addition to the records: initial weights and a teacher.

Shapes: B samples of a batch, K outputs.
"""

import safetensors.torch
import torch
from torch import Tensor, nn

from cluster import commit
from train import nets
from train.bundle.bundle import WEIGHTS
from train.config import Net
from train.loop.parallelism import Worker
from train.loop.run_directory import DistillationConfig
from train.nets import fake_quant
from train.nets.losses import distillation_loss
from train.tasks import Task


def load_initial_weights(net: nn.Module, lesson: DistillationConfig) -> bool:
    """Load the initial weights into a network, if there are any; return whether there are.

    Installs fake quantization, too, if `lesson` requires it.
    """
    if lesson.start is not None:
        nets.resize_net(net, _weights(lesson.start))
    if lesson.quantized:
        fake_quant.install_fake_quant(net)
    return lesson.start is not None


class Teacher:
    """A trained network whose outputs are learned in addition to the targets."""

    def __init__(self, lesson: DistillationConfig, task: Task, worker: Worker) -> None:
        assert lesson.teacher is not None
        net = nets.create_net(Net.model_validate(lesson.teacher_net), task)
        nets.resize_net(net, _weights(lesson.teacher))
        # Not a submodule of the trained network, because batches must not update its buffers.
        self._net = nets.folded_net(net).to(worker.device).requires_grad_(False)
        self._share = lesson.teacher_fraction
        self._loss = distillation_loss(task.target, lesson.temperature)

    def blended(self, loss: Tensor, inputs: list[Tensor], outputs_BK: Tensor) -> Tensor:
        """Return the weighted mean of `loss` and the loss against the teacher, float32 [].

        loss: float32 [], against the targets. inputs: of the network, [B, …] each. outputs_BK:
        float32 [B, K], logits.
        """
        with torch.no_grad():
            taught_BK = self._net(*inputs).float()
        return (1 - self._share) * loss + self._share * self._loss(outputs_BK, taught_BK)


def _weights(url: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(commit.fetch(url, last=commit.DIGESTS) / WEIGHTS)
