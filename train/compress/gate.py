"""The gate: a variant is served only if held-out records say that it may be."""

from dataclasses import dataclass

from train.tasks.targets import LOWER_IS_BETTER

# A count of records is never exactly a fraction of them.
EPSILON = 1e-9


@dataclass(frozen=True)
class Verdict:
    accepted: bool
    reason: str


def judge(metric: str, reference: float, value: float, max_drop: float) -> Verdict:
    """Accept a variant whose held-out `value` is at most `max_drop` worse than fp32's."""
    lower_is_better = metric.endswith(LOWER_IS_BETTER)
    drop = value - reference if lower_is_better else reference - value
    figures = f"{metric} {value:.4f} against {reference:.4f} in fp32"
    # A NaN compares false and is refused.
    if drop <= max_drop + EPSILON:
        return Verdict(True, f"{figures}: within {max_drop:g}")
    return Verdict(False, f"{figures}: {drop:.4f} worse, more than the accepted {max_drop:g}")
