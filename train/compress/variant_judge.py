"""Compares variants with fp32 on the held-out splits."""

import math
import sys
from pathlib import Path

import numpy as np

from train.bundle import engines
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.bundle.manifest import Timing, Variant
from train.compress import benchmark, gate
from train.compress.gate import GateVerdict, VariantComparison
from train.compress.recipes.variant_builder import BuiltVariant, VariantSkipped
from train.compress.recipes.variants import RECIPES
from train.compress.scoring import run_batches
from train.config import Config
from train.data.dataset import EncodedDataset
from train.tasks import Arrays

# Another processor may round differently: relative to the largest golden output.
TOLERANCE, TOLERANCE_REDUCED = 1e-3, 0.03

NUM_GOLDEN = 8

FULL = ("fp32", "pruned", "distilled", "int8_weights")

# How variants are called that are not the trained net, but one that learned from it.
OTHER_NETS = ("pruned", "distilled")


class VariantJudge:
    """Compares variants with fp32 on the held-out splits."""

    def __init__(self, config: Config, shards: EncodedDataset) -> None:
        self._config, self._task = config.compress, shards.task
        self._splits = {name: shards.open(name) for name in ("valid", "test")}
        self._reference: Arrays | None = None
        self.golden_inputs = first_records(self._splits["test"][0], NUM_GOLDEN)

    def check(self, outputs: Arrays) -> None:
        """Raises VariantSkipped for what are no outputs of this task."""
        logits_NK = outputs.get("logits")
        width = self._task.target.num_outputs
        if logits_NK is None or logits_NK.ndim != 2 or logits_NK.shape[1] != width:
            came = {name: list(array.shape) for name, array in outputs.items()}
            raise VariantSkipped(f"its outputs are {came}; expected logits [N, {width}]")
        if not np.isfinite(logits_NK).all():
            raise VariantSkipped("it answers NaN or infinity for held-out records")

    def passes(self, path: Path, reference: Path) -> bool:
        """Whether the drop of an ONNX file from another is within what is accepted."""
        inputs, targets_N = self._splits["valid"]
        before, after = (
            run_batches(OnnxRuntimeEngine.load(each, num_threads=benchmark.num_cores()), inputs)
            for each in (reference, path)
        )
        comparison = gate.compare_with_fp32(self._task, before, after, targets_N)
        return self._verdict(comparison, same_net=True).verdict == "accepted"

    def _verdict(
        self, comparison: VariantComparison, *, same_net: bool, batch: float = 0.0
    ) -> GateVerdict:
        return gate.judge_variant(
            comparison,
            self._config.max_accuracy_drop,
            max_change=self._config.max_change if same_net else math.inf,
            strict=self._config.strict,
            batch=batch,
        )

    def evaluate(
        self, name: str, made: BuiltVariant, engine: str, profile: list[Timing], folder: Path
    ) -> tuple[Variant, Arrays, dict[str, Arrays]]:
        """Return what is to be known of a variant, and its outputs: golden, and by split.

        fp32 comes first: the others are compared with it. Raises VariantSkipped.
        """
        kind = engines.find_engine(engine)
        fast = kind.load(made.path, num_threads=benchmark.num_cores())
        inputs, targets_N = self._splits["valid"]
        valid, test = (run_batches(fast, self._splits[split][0]) for split in ("valid", "test"))
        for outputs in (valid, test):
            self.check(outputs)
        if self._reference is None:
            assert name == "fp32"
            self._reference = valid
        single = kind.load(made.path, num_threads=1)
        golden = single.run(self.golden_inputs)
        batch = gate.batch_difference(
            self._task, single, first_records(inputs, max(gate.BATCH_SIZES))
        )
        comparison = gate.compare_with_fp32(self._task, self._reference, valid, targets_N)
        same_net = not (name in RECIPES and name.startswith(OTHER_NETS))
        verdict = self._verdict(comparison, same_net=same_net, batch=batch)
        if name == "fp32":
            reason = "it is what the others are compared with"
            if not batch <= gate.MAX_BATCH_DIFFERENCE:
                reason += f"; its answers depend on the batch they travel in, by {batch:.2g}"
                print(f"warning: fp32: {reason}", file=sys.stderr)
            verdict = GateVerdict("accepted", reason)
        tests = self._task.metrics(test, self._splits["test"][1], "test")
        largest = max(float(np.max(np.abs(array))) for array in golden.values())
        tolerance = TOLERANCE if name in FULL else TOLERANCE_REDUCED
        variant = Variant(
            engine=engine,
            file=made.path.relative_to(folder).as_posix(),
            recipe=made.recipe,
            verdict=verdict.verdict,
            reason=verdict.reason,
            metrics={**self._task.metrics(valid, targets_N, "valid"), **tests},
            drop=[comparison.drop, comparison.low, comparison.high],
            agreement=comparison.agreement,
            change=comparison.change,
            batch_difference=batch if np.isfinite(batch) else None,
            size_bytes=sum(file.stat().st_size for file in made.path.parent.iterdir()),
            profile=profile,
            golden_tolerance=tolerance * max(1.0, largest),
        )
        return variant, golden, {"valid": valid, "test": test}


def first_records(inputs: Arrays, count: int) -> Arrays:
    return {name: np.array(array[:count]) for name, array in inputs.items()}
