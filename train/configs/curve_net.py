"""The net of the task in curves.py."""

import torch
from torch import Tensor, nn

from train.tasks import Task


class CurveNet(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 32, 5, padding=2)
        self.head = nn.Linear(64, task.target.num_outputs)

    def forward(self, curves_BL: Tensor) -> Tensor:
        x_BCL = torch.relu(self.conv(curves_BL[:, None]))
        return self.head(torch.cat([x_BCL.mean(dim=2), x_BCL.amax(dim=2)], dim=1))
