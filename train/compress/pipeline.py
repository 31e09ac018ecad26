"""Build the variants of a trained network, benchmark them and judge their accuracy."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from torch import nn

from cluster.errors import CommandFailed
from train import nets
from train.bundle import Bundle, BundleWriter, engines
from train.bundle.engines import Engine
from train.bundle.manifest import Timing, Variant, rank_variants, typical_timings
from train.compress import benchmark
from train.compress.benchmark import BenchmarkCase
from train.compress.recipes.export_onnx import ExportError
from train.compress.recipes.variant_builder import BuiltVariant, VariantBuilder, VariantSkipped
from train.compress.recipes.variants import RECIPES
from train.compress.report import write_variants_table
from train.compress.variant_judge import VariantJudge
from train.config import Config
from train.data.dataset import EncodedDataset
from train.nets.torch_engine import TorchEngine
from train.reports import plots
from train.tasks import Arrays
from train.telemetry.work_bar import WorkBar

EAGER = "eager fp32"

PACKAGES = ("ray", "torch", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class CompressionResult:
    """The variants of a network.

    skipped: reasons by variant that could not be built. default: name of the default variant.
    eager: latencies of the network in PyTorch eager mode, none for an imported model. outputs:
    outputs of the default variant, by held-out split. host: the machine of the measurements.
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
        """The fields of the bundle's manifest that compression fills in."""
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
    net: nn.Module | Path,
    config: Config,
    shards: EncodedDataset,
    writer: BundleWriter,
    root: str,
    *,
    earlier: Bundle | None = None,
    own: Mapping[str, Path] | None = None,
) -> CompressionResult:
    """Write fp32, each of `compress.variants` and golden outputs of each into the bundle.

    net: the trained network, or the ONNX file of an imported model. root: the storage path, where
    runs of fine-tuning are stored.
    earlier: a bundle of the same network; its variants that were made with the same options are
    copied.
    own: user-supplied ONNX files, by the name of the variant.

    The gate compares metrics of the validation split, so that no choice depends on the test split.
    Raises CommandFailed if fp32 cannot be run or a file cannot be written.
    """
    try:
        return _compress(net, config, shards, writer, root, earlier, own or {})
    except (OSError, SafetensorError) as error:  # safetensors raises its own if the disk is full
        reason = getattr(error, "strerror", None) or error
        raise CommandFailed(
            f"variants cannot be written: {reason}; no bundle was created. The training "
            "checkpoints are kept."
        ) from error


def _compress(
    net: nn.Module | Path,
    config: Config,
    shards: EncodedDataset,
    writer: BundleWriter,
    root: str,
    earlier: Bundle | None,
    own: Mapping[str, Path],
) -> CompressionResult:
    with TemporaryDirectory(prefix="compress-") as scratch:
        judge = VariantJudge(config, shards)
        builder = VariantBuilder(
            net, config, shards, writer, Path(scratch), root, judge.passes, earlier=earlier
        )
        judge.add_training(builder.uncalibrated_ids)
        made, skipped = _make(builder, own)
        loaded = _loaded(made, judge, skipped)
        eager = BenchmarkCase(EAGER, "torch", 1)
        if isinstance(net, nn.Module):
            names = [spec.name for spec in shards.task.features.inputs]
            loaded[eager] = TorchEngine(nets.folded_net(net), names, "fp32", 1)
        timings = benchmark.benchmark_variants(
            loaded, judge.timed_inputs, config.compress.measure_seconds
        )
        variants, golden, outputs = {}, {}, {}
        names = [name for name in made if name not in skipped]
        with WorkBar("evaluating", len(names), "variants") as bar:
            for name in names:
                bar.begin(name)
                of_variant = {key: timings[key] for key in loaded if key.variant == name}
                singles = [key for key in of_variant if key.threads == 1]
                best = min(singles, key=lambda key: _cost(timings[key], config))
                profile = [timing for each in of_variant.values() for timing in each]
                try:
                    variants[name], golden[name], outputs[name] = judge.evaluate(
                        name, made[name], best.engine, profile, writer.path
                    )
                except VariantSkipped as error:
                    _skip(skipped, name, str(error))
                bar.advance()
        writer.golden(judge.golden_inputs, golden)
    optimize_for = config.compress.optimize_for
    default = rank_variants(variants, optimize_for)[0]
    engines_here = {key.engine: each.describe() for key, each in loaded.items() if key.threads == 1}
    host = {**benchmark.describe_host(), "engines": engines_here}
    result = CompressionResult(
        variants, skipped, default, timings.get(eager, []), host, optimize_for, outputs[default]
    )
    metric = shards.task.find_metric(f"test_{shards.task.metric}")
    plots.plot_tradeoff(variants, metric, default, writer.file("report/variants.png"))
    write_variants_table(result, metric.name, writer.file("report/variants.md"))
    return result


def _make(
    builder: VariantBuilder, own: Mapping[str, Path]
) -> tuple[dict[str, BuiltVariant], dict[str, str]]:
    made: dict[str, BuiltVariant] = {}
    skipped: dict[str, str] = {}
    names = list(dict.fromkeys(["fp32", *builder.config.compress.variants, *builder.kept, *own]))
    for number, name in enumerate(names, 1):
        # No bar, because variants that are trained show their own.
        print(f"making variant {name}, {number} of {len(names)}", file=sys.stderr)
        try:
            made[name] = (
                builder.taken(name, own[name])
                if name in own
                else builder.make(name, RECIPES.get(name))
            )
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # quantizers, pruners and training raise many classes
            if name == "fp32":
                raise
            kind = (
                ""
                if isinstance(error, VariantSkipped | ExportError | CommandFailed)
                else type(error).__name__
            )
            _skip(skipped, name, f"{kind}: {_line(error)}".removeprefix(": "))
    if reason := made["fp32"].recipe.get("not_exported"):
        print(f"fp32 runs on torch; the network cannot be exported: {reason}", file=sys.stderr)
    return made, skipped


def _skip(skipped: dict[str, str], name: str, reason: str) -> None:
    """Record why a variant is skipped. Raises CommandFailed for fp32, which is always needed."""
    if name == "fp32":
        raise CommandFailed(f"fp32 cannot be run, so the model cannot be compressed: {reason}")
    skipped[name] = reason
    print(f"variant {name} is skipped: {reason}", file=sys.stderr)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _loaded(
    made: Mapping[str, BuiltVariant], judge: "VariantJudge", skipped: dict[str, str]
) -> dict[BenchmarkCase, Engine]:
    """Load each variant into every available engine, with one thread and with all cores."""
    loaded: dict[BenchmarkCase, Engine] = {}
    for name, variant in made.items():
        reasons = []
        for engine in engines.engines_for(variant.path):
            try:
                kind = engines.find_engine(engine)
                for threads in benchmark.thread_counts():
                    candidate = kind.load(variant.path, num_threads=threads)
                    judge.check(candidate.run(judge.golden_inputs))
                    loaded[BenchmarkCase(name, engine, threads)] = candidate
            except Exception as error:  # engines raise many classes
                reasons.append(f"{engine}: {_line(error)}")
                loaded = {key: each for key, each in loaded.items() if key[:2] != (name, engine)}
        if not any(key.variant == name for key in loaded):
            _skip(skipped, name, "; ".join(reasons) or "no engine on this machine reads it")
        else:
            for reason in reasons:
                print(f"variant {name} does not run on {reason}", file=sys.stderr)
    return loaded


def _cost(timings: list[Timing], config: Config) -> float:
    if config.compress.optimize_for == "latency":
        return timings[0].p50_ms
    return min(timing.p50_ms / timing.batch_size for timing in typical_timings(timings))
