"""The predictor: bundle and engine, records to predictions."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from train.bundle import engines
from train.bundle.bundle import Bundle, CorruptBundle
from train.bundle.engines import Engine
from train.bundle.manifest import rank_variants
from train.tasks import Arrays, Columns, Record, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictor:
    """Turns records into predictions with one variant of a bundle."""

    bundle: Bundle
    task: Task
    variant: str
    engine: Engine

    @classmethod
    def load(cls, bundle: Bundle, variant: str | None = None, *, num_threads: int = 1) -> Self:
        """Load `variant` and run the golden self-test.

        When None, the bundle's default; the next best, told in the log, where this machine lacks
        its engine or computes it differently.

        Raises CorruptBundle when no such variant answers as it did when the bundle was made,
        ValueError for a variant that is unknown or that the gate did not accept.
        """
        manifest = bundle.manifest
        accepted = rank_variants(manifest.variants, manifest.optimize_for)
        if variant is not None and variant not in accepted:
            entry = manifest.variants.get(variant)
            came = f"was {entry.verdict} by the gate" if entry else "is unknown"
            if entry and entry.verdict == "undecided":
                came = "was left undecided by the gate"
            raise ValueError(
                f"variant '{variant}' {came}; '{manifest.name}' has {', '.join(sorted(accepted))}."
            )
        names = [variant] if variant else accepted
        if variant is None and manifest.default_variant in accepted:
            names = list(dict.fromkeys([manifest.default_variant, *accepted]))
        problems = []
        for name in names:
            try:
                engine = _tested(bundle, name, num_threads)
            except _Unfit as error:
                logger.warning("%s", error)
                problems.append(str(error))
            else:
                return cls(bundle, bundle.task, name, engine)
        raise CorruptBundle((problems or [f"'{bundle.path}' has no accepted variant."])[0])

    def encode(self, columns: Columns) -> Arrays:
        """Return the arrays of N records. Raises InvalidRecord."""
        return self.task.features.encode(columns)

    def run(self, inputs: Arrays) -> Arrays:
        """Return the predictions for a batch of encoded records."""
        return self.task.target.decode(self.engine.run(inputs))

    def predict(self, records: Sequence[Record]) -> Arrays:
        """Return the predictions for records, one row each. Raises InvalidRecord."""
        return self.run(self.task.features.encode_records(records))


class _Unfit(Exception):
    """A variant that this machine cannot run as it was."""


def _tested(bundle: Bundle, variant: str, num_threads: int) -> Engine:
    """Load a variant's engine and let it answer the golden inputs. Raises _Unfit."""
    entry = bundle.manifest.variants[variant]
    inputs, expected = bundle.golden(variant)
    if not expected:
        raise CorruptBundle(f"'{bundle.path}' has no golden outputs of variant '{variant}'.")
    try:
        engine = engines.find_engine(entry.engine).load(
            bundle.path / entry.file, num_threads=num_threads
        )
        outputs = engine.run(inputs)
    except Exception as error:  # engines raise many kinds
        raise _Unfit(
            f"variant '{variant}' of '{bundle.path}' cannot be run by {entry.engine} here "
            f"({' '.join(str(error).split())[:200]}): name another variant."
        ) from error
    for name, values in expected.items():
        difference = float(np.max(np.abs(outputs[name] - values)))
        if not difference <= entry.golden_tolerance:
            raise _Unfit(
                f"variant '{variant}' of '{bundle.path}' answers '{name}' {difference:.3g} "
                f"away from its golden outputs; at most {entry.golden_tolerance:.3g} is "
                "accepted. This processor computes it differently: name another variant."
            )
    return engine
