"""The predictor: runs records through a variant of a bundle. Shapes: N records, R rounds."""

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
from train.values.ragged import Ragged, StoredArrays
from train.values.records import num_rows

logger = logging.getLogger(__name__)

# The variant with which the gate compares the others.
REFERENCE = "fp32"
# Batch size for comparisons of throughput.
MANY_ROWS = 32
# fp32 replaces the default variant if it takes at most this fraction of the default's time and is
# faster in at least this fraction of the rounds.
FASTER, AGREEING = 0.9, 0.75
# Largest number of rounds after a warm-up round, and seconds after which no round starts.
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
        """Load a variant and run the self-test on the golden records.

        variant: None stands for the bundle's default. If this machine lacks its engine or computes
        other outputs, the next best accepted variant is loaded, and the log has a warning.
        num_threads: threads of the engine.

        Raises CorruptBundle if no such variant reproduces its golden outputs, ValueError for an
        unknown variant or one that the gate did not accept.
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
        """Load a variant as `load` does, but fp32 instead of the default if it is clearly faster.

        The default variant was the fastest on the machine that made the bundle; this processor may
        lack the instructions for it. Both variants run in turns for about a second. A bundle that
        is optimized for size keeps its default.

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
            "variant '%s' of '%s' takes %.3g ms for %d records on this machine, fp32 %.3g ms: "
            "fp32 is served. To serve another variant, name it.",
            *(chosen.variant, bundle.path, chosen_ms, rows, reference_ms),
        )
        return reference

    def encode(self, columns: Columns) -> Arrays:
        """Return the arrays of N records by name, [N, …] each. Raises InvalidRecord."""
        return self.task.features.encode(columns)

    def run(self, inputs: Arrays) -> Arrays:
        """Return the predictions for a batch of encoded records, both arrays [N, …] by name."""
        return self.task.target.decode(self.engine.run(inputs))

    def run_many(self, inputs: Arrays) -> Arrays:
        """Return the predictions for any number of encoded records, both [N, …] by name."""
        if not num_rows(inputs):
            return {spec.name: spec.empty() for spec in self.task.target.outputs}
        lists = [spec.name for spec in self.task.features.inputs if spec.ragged]
        stored: StoredArrays = inputs | {name: Ragged.of(inputs[name]) for name in lists}
        return engines.run_batches(self.run, stored)

    def predict(self, records: Sequence[Record]) -> Arrays:
        """Return the predictions for N records, arrays [N, …] by name. Raises InvalidRecord."""
        return self.run_many(self.task.features.encode_records(records))


def _compare_speed(one: Predictor, other: Predictor, rows: int) -> np.ndarray:
    """Return the milliseconds that both take for the same batch, float64 [R, 2]."""
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
    """This machine cannot run a variant, or computes other outputs with it."""


def _tested(bundle: Bundle, variant: str, num_threads: int) -> Engine:
    """Load a variant's engine and check that it reproduces the golden outputs.

    Raises _Unfit if not, CorruptBundle if the bundle has no golden outputs of the variant.
    """
    entry = bundle.manifest.variants[variant]
    inputs, expected = bundle.golden(variant)
    if not expected:
        raise CorruptBundle(f"'{bundle.path}' has no golden outputs of variant '{variant}'.")
    try:
        engine = engines.find_engine(entry.engine).load(
            bundle.path / entry.file, num_threads=num_threads
        )
        outputs = engine.run(inputs)
    except Exception as error:  # engines raise many types of errors
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
                f"variant '{variant}' of '{bundle.path}' returns '{name}' with a relative "
                f"difference of {difference:.3g} from its golden outputs; at most "
                f"{entry.golden_tolerance:.3g} is accepted. This processor computes other results: "
                "name another variant."
            )
    return engine
