"""Learning-rate schedules: pure functions of the step."""

import math

from train.config import Optim


def lr_factor(config: Optim, step: int, total_steps: int) -> float:
    """Return what the peak rate is multiplied by at `step` of 0..total_steps-1.

    Linear warm-up from above 0, then a fall that reaches 0 just after the last step. At least one
    step has the peak rate.
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
    """Rise from 1/25 to 1 and fall to 1/250,000 with the last step, both as half a cosine.

    After Smith and Topin, https://arxiv.org/abs/1708.07120, with the shape that torch gives it.
    Too few steps to rise in begin at the peak.
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
