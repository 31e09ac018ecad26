"""Learning-rate schedules, as pure functions of the step."""

import math

from train.config import Optim


def lr_factor(config: Optim, step: int, total_steps: int) -> float:
    """Return the factor of the peak learning rate at `step`, 0..total_steps-1.

    The factor rises linearly from above 0 during warm-up. It then stays at 1 ("constant") or falls
    and would reach 0 just after the last step. At least one step has the peak rate. See `one_cycle`
    for the schedule of that name.
    """
    if config.schedule == "one_cycle":
        fraction = 0.3 if config.warmup_fraction is None else config.warmup_fraction
        return one_cycle(step, total_steps, fraction)
    warmup_steps = min(round((config.warmup_fraction or 0) * total_steps), total_steps - 1)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if config.schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2


def one_cycle(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Return the factor of the one-cycle schedule at `step`.

    The factor rises from 1/25 to 1 and falls to 1/250,000 at the last step, each as half a cosine.
    If there are too few steps for a rise, it starts at 1. After Smith and Topin,
    https://arxiv.org/abs/1708.07120, in the form of torch's OneCycleLR.
    """
    start, end = 1 / 25, 1 / 25e4
    peak = max(warmup_fraction * total_steps - 1, 0)
    last = total_steps - 1
    if step < peak:
        return _half_cosine(start, 1, step / peak)
    if step == peak:
        return 1.0
    return _half_cosine(1, end, (step - peak) / (last - peak))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
