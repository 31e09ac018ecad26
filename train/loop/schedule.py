"""Learning-rate schedules: pure functions of the step."""

import math

from train.config import Optim


def factor(config: Optim, step: int, total_steps: int) -> float:
    """Return what the peak rate is multiplied by at `step` of 0..total_steps-1.

    Linear warm-up from above 0, then a fall that reaches 0 just after the last step.
    """
    warmup_steps = round(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if config.schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2
