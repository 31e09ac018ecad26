"""The predictor: bundle and engine, records to predictions."""

import logging
import time
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

# The variant that the others were compared with.
REFERENCE = "fp32"
# How many records are in a batch where throughput counts.
MANY_ROWS = 32
# Share of the default's time below which fp32 is served in its place, if it is faster in so large a
# share of the rounds.
FASTER, AGREEING = 0.9, 0.75
# Most rounds after a first one that warms up, and seconds after which no more begin.
MOST_ROUNDS, MEASURE_S = 100, 1.0


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

    @classmethod
    def load_fastest(
        cls, bundle: Bundle, variant: str | None = None, *, num_threads: int = 1
    ) -> Self:
        """Load as `load` does; when None, fp32 where this machine runs that clearly faster.

        The default variant was the fastest where the bundle was made, and another processor may
        lack the instructions for it. Both run in turns for about a second. A bundle that was
        optimized for size keeps its default.

        Raises CorruptBundle and ValueError as `load` does.
        """
        chosen = cls.load(bundle, variant, num_threads=num_threads)
        manifest = bundle.manifest
        if variant is not None or chosen.variant == REFERENCE or manifest.optimize_for == "size":
            return chosen
        try:
            reference = cls.load(bundle, REFERENCE, num_threads=num_threads)
        except CorruptBundle as error:
            logger.warning("%s", error)
            return chosen
        rows = 1 if manifest.optimize_for == "latency" else MANY_ROWS
        times_R2 = _compare_speed(chosen, reference, rows)
        chosen_ms, reference_ms = np.median(times_R2, axis=0)
        agreeing = np.mean(times_R2[:, 1] < times_R2[:, 0])
        if reference_ms > FASTER * chosen_ms or agreeing < AGREEING:
            return chosen
        logger.warning(
            "variant '%s' of '%s' takes %.3g ms for %d records on this machine, and fp32 %.3g ms: "
            "fp32 is served. Name a variant to serve that one.",
            *(chosen.variant, bundle.path, chosen_ms, rows, reference_ms),
        )
        return reference

    def encode(self, columns: Columns) -> Arrays:
        """Return the arrays of N records. Raises InvalidRecord."""
        return self.task.features.encode(columns)

    def run(self, inputs: Arrays) -> Arrays:
        """Return the predictions for a batch of encoded records."""
        return self.task.target.decode(self.engine.run(inputs))

    def predict(self, records: Sequence[Record]) -> Arrays:
        """Return the predictions for records, one row each. Raises InvalidRecord."""
        return self.run(self.task.features.encode_records(records))


def _compare_speed(one: Predictor, other: Predictor, rows: int) -> np.ndarray:
    """Return the milliseconds [R, 2] that both take for the same batch, in R rounds."""
    golden, _ = one.bundle.golden(one.variant)
    batch = {name: np.resize(array, (rows, *array.shape[1:])) for name, array in golden.items()}
    times: list[list[float]] = []
    started = time.perf_counter()
    for done in range(MOST_ROUNDS + 1):
        if done > 1 and time.perf_counter() - started > MEASURE_S:
            break
        times.append([])
        for predictor in (one, other):
            began = time.perf_counter()
            predictor.engine.run(batch)
            times[-1].append(1e3 * (time.perf_counter() - began))
    return np.array(times[1:])  # the first round warms up


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
        sizes = np.abs(values).reshape(len(values), -1).max(axis=1, initial=1.0)
        differences = np.abs(outputs[name] - values).reshape(len(values), -1).max(axis=1)
        difference = float(np.max(differences / sizes))
        if not difference <= entry.golden_tolerance:
            raise _Unfit(
                f"variant '{variant}' of '{bundle.path}' answers '{name}' {difference:.3g} "
                f"away from its golden outputs, relative to them; at most "
                f"{entry.golden_tolerance:.3g} is accepted. This processor computes it "
                "differently: name another variant."
            )
    return engine
