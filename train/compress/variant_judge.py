"""Comparison of variants with fp32 on the held-out splits. Shapes: N records, K outputs."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from train.bundle import engines
from train.bundle.engines import run_batches
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.bundle.manifest import Timing, Variant
from train.compress import benchmark, gate
from train.compress.gate import GateVerdict, VariantComparison
from train.compress.recipes.variant_builder import BuiltVariant, VariantSkipped
from train.compress.recipes.variants import RECIPES
from train.config import Config
from train.data.dataset import EncodedDataset
from train.tasks import Arrays
from train.values.ragged import Ragged, StoredArrays, pad, row_lengths, take

# Accepted deviation from golden outputs, since another processor may round differently: relative
# to the largest output of a record, for variants in fp32 and for those in lower precision.
TOLERANCE, TOLERANCE_REDUCED = 1e-3, 0.03

# Golden records from the start of the test split; as many with extreme values are added.
NUM_GOLDEN = 8

# Variants that compute in fp32.
FULL = ("fp32", "pruned", "distilled", "int8_weights")

# With fewer validation records than FEW_RECORDS, up to MAX_ADDED training records are added.
FEW_RECORDS, MAX_ADDED = 200, 2_000

# Prefixes of variants that are other networks, which learned from the trained one.
OTHER_NETS = ("pruned", "distilled")


class VariantJudge:
    """Compares variants with fp32 on the validation split.

    If there are few validation records, training records that calibration did not use are added.
    The network was trained on them, so they do not measure its accuracy, but they show how much
    quantization changes it. Fine-tuned variants are compared on validation records only.
    """

    def __init__(self, config: Config, shards: EncodedDataset) -> None:
        self._config, self._shards, self._task = config.compress, shards, shards.task
        self._splits = {name: shards.open(name) for name in ("valid", "test")}
        # Outputs of fp32 by split, set when fp32 is evaluated.
        self._reference: dict[str, Arrays] = {}
        # Outputs of files that versions of a variant are compared with while it is made.
        self._compared_with: dict[Path, dict[str, Arrays]] = {}
        test = self._splits["test"][0]
        self.golden_inputs = golden_records(test)
        # Where records differ in length, their lengths decide which sizes are measured.
        ragged = any(isinstance(array, Ragged) for array in test.values())
        self.timed_inputs: StoredArrays = test if ragged else self.golden_inputs

    def add_training(self, ids_N: np.ndarray) -> None:
        """Also compare on training records, int64 [N] indices, if validation records are few."""
        if len(self._splits["valid"][1]) < FEW_RECORDS and len(ids_N):
            inputs, targets_N = self._shards.open("train")
            ids = np.sort(ids_N[:MAX_ADDED])
            self._splits["train"] = take(inputs, ids), targets_N[ids]

    def check(self, outputs: Arrays) -> None:
        """Raise VariantSkipped unless `outputs` contains finite "logits", float32 [N, K]."""
        logits_NK = outputs.get("logits")
        width = self._task.target.num_outputs
        if logits_NK is None or logits_NK.ndim != 2 or logits_NK.shape[1] != width:
            came = {name: list(array.shape) for name, array in outputs.items()}
            raise VariantSkipped(f"its outputs are {came}; expected logits [N, {width}]")
        if not np.isfinite(logits_NK).all():
            raise VariantSkipped("its outputs for held-out records contain NaN or infinity")

    def passes(self, path: Path, reference: Path, trained: bool) -> bool:
        """Return whether the gate accepts the ONNX file `path` compared with `reference`.

        trained: whether the variant was trained on records that fp32 was not trained on.
        """
        splits = self._compared_on(trained)
        known = self._compared_with.setdefault(reference, {})
        for split in splits:
            if split not in known:  # the same for each version of the variant that is tried
                known[split] = self._outputs_of(reference, split)
        before = {split: known[split] for split in splits}
        after = {split: self._outputs_of(path, split) for split in splits}
        # Acceptance depends on the interval only if compress.strict is set.
        comparison = self._compare(before, after, splits, interval=self._config.strict)
        return self._verdict(comparison, same_net=True).verdict == "accepted"

    def _outputs_of(self, path: Path, split: str) -> Arrays:
        engine = OnnxRuntimeEngine.load(path, num_threads=benchmark.num_cores())
        return run_batches(engine.run, self._splits[split][0])

    def _compared_on(self, trained: bool) -> list[str]:
        """Return the splits to compare on. trained: whether the variant was fine-tuned."""
        return ["valid"] if trained or "train" not in self._splits else ["valid", "train"]

    def _compare(
        self,
        before: dict[str, Arrays],
        after: dict[str, Arrays],
        splits: list[str],
        *,
        interval: bool = True,
    ) -> VariantComparison:
        reference, outputs = (
            {"logits": np.concatenate([each[split]["logits"] for split in splits])}
            for each in (before, after)
        )
        targets_N = np.concatenate([self._splits[split][1] for split in splits])
        return gate.compare_with_fp32(
            self._task, reference, outputs, targets_N, self._config.metric, interval=interval
        )

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
        """Return the manifest entry of a variant, its golden outputs and its outputs by split.

        Outputs are {"logits": float32 [N, K]}. fp32 must be evaluated first, because the other
        variants are compared with it. folder: the bundle. Raises VariantSkipped if the outputs do
        not fit the task.
        """
        kind = engines.find_engine(engine)
        fast = kind.load(made.path, num_threads=benchmark.num_cores())
        outputs = {
            split: run_batches(fast.run, arrays) for split, (arrays, _) in self._splits.items()
        }
        for each in outputs.values():
            self.check(each)
        if not self._reference:
            assert name == "fp32"
            self._reference = outputs
        inputs, targets_N = self._splits["valid"]
        single = kind.load(made.path, num_threads=1)
        golden = single.run(self.golden_inputs)
        batch = gate.batch_difference(
            self._task, single, take(inputs, slice(max(gate.BATCH_SIZES)))
        )
        same_net = not (name in RECIPES and name.startswith(OTHER_NETS))
        splits = self._compared_on(not same_net or "qat_epochs" in made.recipe)
        comparison = self._compare(self._reference, outputs, splits)
        verdict = self._verdict(comparison, same_net=same_net, batch=batch)
        if "train" in splits:
            verdict = replace(verdict, reason=f"{verdict.reason}; {self._words(splits)}")
        if name == "fp32":
            reason = "the reference for the other variants"
            if not batch <= gate.MAX_BATCH_DIFFERENCE:
                reason += f"; predictions for the same record differ between batches by {batch:.2g}"
                print(f"warning: fp32: {reason}", file=sys.stderr)
            verdict = GateVerdict("accepted", reason)
        tests = self._task.metrics(outputs["test"], self._splits["test"][1], "test")
        tolerance = TOLERANCE if name in FULL else TOLERANCE_REDUCED
        variant = Variant(
            engine=engine,
            file=made.path.relative_to(folder).as_posix(),
            recipe=made.recipe,
            verdict=verdict.verdict,
            reason=verdict.reason,
            metrics={**self._task.metrics(outputs["valid"], targets_N, "valid"), **tests},
            drop=[comparison.drop, comparison.low, comparison.high],
            agreement=comparison.agreement,
            change=comparison.change,
            batch_difference=batch if np.isfinite(batch) else None,
            size_bytes=sum(file.stat().st_size for file in made.path.parent.iterdir()),
            profile=profile,
            golden_tolerance=tolerance,
        )
        return variant, golden, outputs

    def _words(self, splits: list[str]) -> str:
        counts = {split: len(self._splits[split][1]) for split in splits}
        return (
            f"compared on only {counts['valid']} validation records and {counts['train']} training "
            "records that calibration did not use"
        )


def golden_records(inputs: StoredArrays) -> Arrays:
    """Return the inputs of golden outputs, [2 · NUM_GOLDEN, ...] each, or fewer of few records.

    inputs: encoded arrays [N, ...] by input name. The first half are the first records. In the
    second half, each number or pixel is the minimum or the maximum of its column, lists are cut to
    half their length, and other inputs repeat. Such records reveal processors on which sums of
    8-bit products saturate; ordinary records may not.
    """
    first = pad(take(inputs, slice(NUM_GOLDEN)))
    generator = np.random.default_rng(0)
    found = {}
    for name, array in first.items():
        if isinstance(inputs[name], Ragged):
            halves_N = -(-row_lengths(array) // 2)
            kept_NL = np.arange(array.shape[1]) < halves_N[:, None]
            kept = kept_NL.reshape(*kept_NL.shape, *[1] * (array.ndim - 2))
            if array.dtype == np.uint8:  # images, whose darkest value is 1
                found[name] = np.concatenate([array, _extremes(array, 1, 255, generator) * kept])
            else:
                found[name] = np.concatenate([array, array * kept])
            continue
        if array.dtype == np.uint8:
            least, most = 0, 255
        elif np.issubdtype(array.dtype, np.floating):
            values = np.array(inputs[name][:MAX_ADDED])
            known = np.where(np.isnan(values), 0, values)
            least, most = known.min(axis=0), known.max(axis=0)
        else:
            found[name] = np.concatenate([array, array])
            continue
        found[name] = np.concatenate([array, _extremes(array, least, most, generator)])
    return found


def _extremes(
    array: np.ndarray,
    least: np.ndarray | int,
    most: np.ndarray | int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return an array like another one that holds only minima and maxima: all, all, a mixture."""
    extreme = np.where(generator.random(array.shape) < 0.5, least, most)
    extreme[:1], extreme[1:2] = least, most
    return extreme.astype(array.dtype)
