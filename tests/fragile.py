"""Nets that fail: one is slow and then raises once its weights are large, one has a bug."""

import os

import torch
from torch import Tensor, nn

from train.tasks import Task

LARGE, PATIENCE = 5.0, 30


class Fragile(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.head = nn.Linear(64, task.target.num_outputs)
        self._calls = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.training:
            self._calls += 1
            if self.head.weight.detach().abs().max() > LARGE:
                torch.linalg.svdvals(torch.ones(300, 300))
                if self._calls > PATIENCE:
                    raise RuntimeError("weights are out of hand")
        return self.head(images_BCHW.flatten(1).float() / 255)


class Mistaken(nn.Module):
    """A net that raises after ten training steps and logs each failure to the file $MISTAKES."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.head = nn.Linear(64, task.target.num_outputs)
        self._calls = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self._calls += self.training
        if self._calls > 10:
            with open(os.environ["MISTAKES"], "a") as file:
                file.write("failed\n")
            return {}["no such key"]
        return self.head(images_BCHW.flatten(1).float() / 255)
