"""Decision on whether a new version of a model may replace the one in production."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from train.bundle.bundle import WEIGHTS, Bundle, CorruptBundle, OutdatedBundle
from train.bundle.manifest import interface_change
from train.bundle.registry import load_version


@dataclass(frozen=True)
class Challenger:
    """A new version that is compared with the version in production.

    metric: "" for a model without metrics. value: that of the new version. score: see `publish`.
    """

    bundle: Bundle
    root: str
    metric: str
    value: float
    score: Callable[[Bundle, str], float] | None

    def compare(self, current: Any | None) -> tuple[bool, str]:
        """Return whether this version may replace `current`, or become the first, and why."""
        if current is None:
            return True, "no version is in production yet"
        number = current.version
        try:
            production = load_version(current, self.root)
        except OutdatedBundle:
            return True, f"version {number} has an older format that can no longer be served"
        except (CorruptBundle, UserError, ValueError) as error:
            return False, f"version {number} in production cannot be read: {error}"
        if change := interface_change(production.manifest, self.bundle.manifest):
            return False, f"{change} from version {number} in production"
        if current.tags.get(WEIGHTS) == self.bundle.weights_digest:
            return True, f"version {number} has the same weights, compressed and accepted again"
        if not self.metric:
            return False, f"it has no metrics to compare with those of version {number}"
        before = float(current.tags.get(self.metric, math.nan))
        words = f"{self.metric} {self.value:.4f} against {{:.4f}} of version {number}"
        if not (same := _same_records(production, self.bundle)) or math.isnan(before):
            if self.score is None:
                why = "has no such figure" if same else "was measured on other validation records"
                return False, f"version {number} {why}"
            try:
                before = self.score(production, self.metric)
            except UserError as error:
                return False, f"version {number} cannot be measured on these records: {error}"
            words += ", measured again on these records"
        found = self.bundle.task.find_metric(self.metric)
        no_worse = found.signed({found.name: self.value}) >= found.signed({found.name: before})
        return no_worse and not math.isnan(self.value), words.format(before)


def version_number(version: Any | None) -> str | None:
    """Return the number of a version in the registry as text; None for no version."""
    return None if version is None else str(version.version)


def _same_records(one: Bundle, other: Bundle) -> bool:
    """Return whether two bundles were measured on the same validation records."""
    digests = [bundle.manifest.data["valid"].get("digest") for bundle in (one, other)]
    return digests[0] is not None and digests[0] == digests[1]
