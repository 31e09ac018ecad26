"""The predictor: bundle and engine, records to predictions."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from train.bundle.bundle import Bundle, CorruptBundle
from train.bundle.engines import ENGINES, Engine
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
        """Load `variant`, the bundle's default when None, and run the golden self-test.

        Raises CorruptBundle when the engine does not answer as it did when the bundle was made,
        ValueError for a variant that is unknown or that the gate refused.
        """
        manifest = bundle.manifest
        variant = variant or manifest.default_variant
        accepted = [name for name, entry in manifest.variants.items() if entry.accepted]
        if variant not in accepted:
            came = "was refused by the gate" if variant in manifest.variants else "is unknown"
            raise ValueError(
                f"variant '{variant}' {came}; '{manifest.name}' has {', '.join(accepted)}."
            )
        entry = manifest.variants[variant]
        engine = ENGINES[entry.engine].load(bundle.path / entry.file, num_threads=num_threads)
        inputs, expected = bundle.golden(variant)
        outputs = engine.run(inputs)
        if not expected:
            raise CorruptBundle(f"'{bundle.path}' has no golden outputs of variant '{variant}'.")
        for name, values in expected.items():
            difference = float(np.max(np.abs(outputs[name] - values)))
            if not difference <= entry.golden_tolerance:
                raise CorruptBundle(
                    f"variant '{variant}' of '{bundle.path}' answers '{name}' {difference:.3g} "
                    f"away from its golden outputs; at most {entry.golden_tolerance:.3g} is "
                    "accepted. This processor computes it differently: name another variant."
                )
        return cls(bundle, bundle.task, variant, engine)

    def encode(self, columns: Columns) -> Arrays:
        """Return the arrays of N records. Raises InvalidRecord."""
        return self.task.features.encode(columns)

    def run(self, inputs: Arrays) -> Arrays:
        """Return the predictions for a batch of encoded records."""
        return self.task.target.decode(self.engine.run(inputs))

    def predict(self, records: Sequence[Record]) -> Arrays:
        """Return the predictions for records, one row each. Raises InvalidRecord."""
        return self.run(self.task.features.encode_records(records))
