"""Make the variants of a net, measure them, and let the gate decide."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn

from cluster.errors import Failed
from train import nets, report
from train.bundle import Bundle, BundleWriter, engines
from train.bundle.engines import Engine
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.bundle.manifest import Timing, Variant, ranked
from train.compress import gate, measure, table
from train.compress.export import ExportError
from train.compress.gate import Comparison, Verdict
from train.compress.measure import Measured
from train.compress.recipes import RECIPES, Made, Skipped, Workshop
from train.config import Config
from train.data.shards import Shards, batches
from train.nets.engine import TorchEngine
from train.tasks import Arrays

BATCH_SIZE = 256
NUM_GOLDEN = 8
# Another processor may round differently: relative to the largest golden output.
TOLERANCE, TOLERANCE_REDUCED = 1e-3, 0.03
FULL = ("fp32", "pruned", "distilled", "int8_weights")
# How variants are called that are not the trained net, but one that learned from it.
OTHER_NETS = ("pruned", "distilled")
EAGER = "eager fp32"
PACKAGES = ("ray", "torch", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Compressed:
    """The variants of a net.

    skipped: those that could not be made, and why. outputs: of the default one, by held-out split.
    """

    variants: dict[str, Variant]
    skipped: dict[str, str]
    default: str
    eager: list[Timing]
    host: dict[str, Any]
    optimize_for: str
    outputs: dict[str, Arrays]

    @property
    def fields(self) -> dict[str, Any]:
        """What of it a manifest tells."""
        return {
            "metrics": self.variants["fp32"].metrics,
            "variants": self.variants,
            "skipped": self.skipped,
            "default_variant": self.default,
            "optimize_for": self.optimize_for,
            "eager": self.eager,
            "host": self.host,
            "versions": {package: version(package) for package in PACKAGES},
        }


def compress(
    net: nn.Module,
    config: Config,
    shards: Shards,
    writer: BundleWriter,
    root: str,
    *,
    earlier: Bundle | None = None,
    own: Mapping[str, Path] | None = None,
) -> Compressed:
    """Write fp32 and each of `compress.variants` into the bundle, with golden outputs of each.

    net: the trained net. root: the storage path, for nets that are trained again.
    earlier: a bundle of the same net; what is in it and made alike is not made again.
    own: ONNX files made elsewhere, by the name of the variant.

    The gate compares the validation split, so that the test split stays apart from every choice.
    Raises Failed when a file cannot be written.
    """
    try:
        return _compress(net, config, shards, writer, root, earlier, own or {})
    except (OSError, SafetensorError) as error:  # safetensors has a kind of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise Failed(
            f"variants cannot be written: {reason}; no bundle was made, and what was trained is "
            "kept."
        ) from error


def _compress(
    net: nn.Module,
    config: Config,
    shards: Shards,
    writer: BundleWriter,
    root: str,
    earlier: Bundle | None,
    own: Mapping[str, Path],
) -> Compressed:
    with TemporaryDirectory(prefix="compress-") as scratch:
        judge = _Judge(config, shards)
        shop = Workshop(
            net, config, shards, writer, Path(scratch), root, judge.passes, earlier=earlier
        )
        made, skipped = _make(shop, own)
        eager = TorchEngine(
            nets.folded(net), [spec.name for spec in shards.task.features.inputs], "fp32", 1
        )
        loaded = _loaded(made, judge, skipped)
        loaded[Measured(EAGER, "torch", 1)] = eager
        timings = measure.profiles(loaded, judge.golden_inputs, config.compress.measure_seconds)
        variants, golden, outputs = {}, {}, {}
        for name in [name for name in made if name not in skipped]:
            of_variant = {key: timings[key] for key in loaded if key.variant == name}
            singles = [key for key in of_variant if key.threads == 1]
            best = min(singles, key=lambda key: _cost(timings[key], config))
            profile = [timing for each in of_variant.values() for timing in each]
            try:
                variants[name], golden[name], outputs[name] = judge.judged(
                    name, made[name], best.engine, profile, writer.path
                )
            except Skipped as error:
                _skip(skipped, name, str(error))
        writer.golden(judge.golden_inputs, golden)
    optimize_for = config.compress.optimize_for
    default = ranked(variants, optimize_for)[0]
    eager_profile = timings[Measured(EAGER, "torch", 1)]
    engines_here = {key.engine: each.describe() for key, each in loaded.items() if key.threads == 1}
    host = {**measure.host(), "engines": engines_here}
    result = Compressed(
        variants, skipped, default, eager_profile, host, optimize_for, outputs[default]
    )
    metric = f"test_{shards.task.metric}"
    report.tradeoff(variants, metric, default, writer.file("report/variants.png"))
    table.write(result, metric, writer.file("report/variants.md"))
    return result


def _make(shop: Workshop, own: Mapping[str, Path]) -> tuple[dict[str, Made], dict[str, str]]:
    made: dict[str, Made] = {}
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(["fp32", *shop.config.compress.variants, *shop.kept, *own]):
        try:
            made[name] = shop.taken(name, own[name]) if name in own else shop.make(name)
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # of quantizers, pruners, training: many kinds
            if name == "fp32":
                raise
            kind = "" if isinstance(error, Skipped | ExportError | Failed) else type(error).__name__
            _skip(skipped, name, f"{kind}: {_line(error)}".removeprefix(": "))
    if reason := made["fp32"].recipe.get("not_exported"):
        print(f"fp32 is run by torch, as the net cannot be exported: {reason}", file=sys.stderr)
    return made, skipped


def _skip(skipped: dict[str, str], name: str, reason: str) -> None:
    """Leave a variant out. Raises Failed for the one that the others are compared with."""
    if name == "fp32":
        raise Failed(f"the net itself cannot be compressed: {reason}")
    skipped[name] = reason
    print(f"{name} is left out: {reason}", file=sys.stderr)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _loaded(
    made: Mapping[str, Made], judge: "_Judge", skipped: dict[str, str]
) -> dict[Measured, Engine]:
    """Load each variant into every engine of this machine that runs it, by one and all threads."""
    loaded: dict[Measured, Engine] = {}
    for name, variant in made.items():
        reasons = []
        for engine in engines.found_for(variant.path):
            try:
                kind = engines.find(engine)
                for threads in measure.thread_counts():
                    candidate = kind.load(variant.path, num_threads=threads)
                    judge.check(candidate.run(judge.golden_inputs))
                    loaded[Measured(name, engine, threads)] = candidate
            except Exception as error:  # engines raise many kinds
                reasons.append(f"{engine}: {_line(error)}")
                loaded = {key: each for key, each in loaded.items() if key[:2] != (name, engine)}
        if not any(key.variant == name for key in loaded):
            _skip(skipped, name, "; ".join(reasons) or "no engine here reads it")
        else:
            for reason in reasons:
                print(f"{name} is not run by {reason}", file=sys.stderr)
    return loaded


def _cost(timings: list[Timing], config: Config) -> float:
    if config.compress.optimize_for == "latency":
        return timings[0].p50_ms
    return min(timing.p50_ms / timing.batch_size for timing in timings)


class _Judge:
    """Compares variants with fp32 on the held-out splits."""

    def __init__(self, config: Config, shards: Shards) -> None:
        self._config, self._task = config.compress, shards.task
        self._splits = {name: shards.open(name) for name in ("valid", "test")}
        self._reference: Arrays | None = None
        self.golden_inputs = _first(self._splits["test"][0], NUM_GOLDEN)

    def check(self, outputs: Arrays) -> None:
        """Raises Skipped for what are no outputs of this task."""
        logits_NK = outputs.get("logits")
        width = self._task.target.num_outputs
        if logits_NK is None or logits_NK.ndim != 2 or logits_NK.shape[1] != width:
            came = {name: list(array.shape) for name, array in outputs.items()}
            raise Skipped(f"its outputs are {came}; expected logits [N, {width}]")
        if not np.isfinite(logits_NK).all():
            raise Skipped("it answers NaN or infinity for held-out records")

    def passes(self, path: Path, reference: Path) -> bool:
        """Whether the drop of an ONNX file from another is within what is accepted."""
        inputs, targets_N = self._splits["valid"]
        before, after = (
            _run(OnnxRuntimeEngine.load(each, num_threads=measure.num_cores()), inputs)
            for each in (reference, path)
        )
        comparison = gate.compare(self._task, before, after, targets_N)
        return self._verdict(comparison, same_net=True).verdict == "accepted"

    def _verdict(self, comparison: Comparison, *, same_net: bool, batch: float = 0.0) -> Verdict:
        return gate.judge(
            comparison,
            self._config.max_accuracy_drop,
            max_change=self._config.max_change if same_net else math.inf,
            strict=self._config.strict,
            batch=batch,
        )

    def judged(
        self, name: str, made: Made, engine: str, profile: list[Timing], folder: Path
    ) -> tuple[Variant, Arrays, dict[str, Arrays]]:
        """Return what is to be known of a variant, and its outputs: golden, and by split.

        fp32 comes first: the others are compared with it. Raises Skipped.
        """
        kind = engines.find(engine)
        fast = kind.load(made.path, num_threads=measure.num_cores())
        inputs, targets_N = self._splits["valid"]
        valid, test = (_run(fast, self._splits[split][0]) for split in ("valid", "test"))
        for outputs in (valid, test):
            self.check(outputs)
        if self._reference is None:
            assert name == "fp32"
            self._reference = valid
        single = kind.load(made.path, num_threads=1)
        golden = single.run(self.golden_inputs)
        batch = gate.batch_difference(self._task, single, _first(inputs, max(gate.BATCH_SIZES)))
        comparison = gate.compare(self._task, self._reference, valid, targets_N)
        same_net = not (name in RECIPES and name.startswith(OTHER_NETS))
        verdict = self._verdict(comparison, same_net=same_net, batch=batch)
        if name == "fp32":
            reason = "it is what the others are compared with"
            if not batch <= gate.MAX_BATCH_DIFFERENCE:
                reason += f"; its answers depend on the batch they travel in, by {batch:.2g}"
                print(f"warning: fp32: {reason}", file=sys.stderr)
            verdict = Verdict("accepted", reason)
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


def _run(engine: Engine, inputs: Arrays) -> Arrays:
    count = len(next(iter(inputs.values())))
    parts = [
        engine.run({name: array[part] for name, array in inputs.items()})
        for part in batches(count, BATCH_SIZE)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _first(inputs: Arrays, count: int) -> Arrays:
    return {name: np.array(array[:count]) for name, array in inputs.items()}
