"""Network of the task in curves.py. Shapes: B batch, L length of a curve, C channels."""

import torch
from torch import Tensor, nn

from train.tasks import Task


class CurveNet(nn.Module):
    """A 1-D convolution, mean and maximum over the curve, and a linear layer."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 32, 5, padding=2)
        self.head = nn.Linear(64, task.target.num_outputs)

    def forward(self, curves_BL: Tensor) -> Tensor:
        """Return outputs, float [B, num_outputs], for curves, float32 [B, L]."""
        x_BCL = torch.relu(self.conv(curves_BL[:, None]))
        return self.head(torch.cat([x_BCL.mean(dim=2), x_BCL.amax(dim=2)], dim=1))
