"""python -m train.compress: recompress a model, add a variant, or export one for edge devices."""

import functools
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import AliasChoices, Field
from pydantic_settings import CliPositionalArg, CliUnknownArgs, SettingsConfigDict
from torch import nn

from cluster import connect, storage

connect.set_ray_environment()

from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import CommandFailed, UserError
from train import cli, nets, reports
from train.bundle import Bundle, BundleWriter, CorruptBundle, publishing, registry, signature
from train.bundle.bundle import BASELINE, FEATURES, WEIGHTS
from train.compress import compress, export_edge
from train.compress.recipes.variants import RECIPES, check_calibration
from train.compress.scoring import validation_score
from train.config import Config, bundle_config, validate_config
from train.data import dataset
from train.data.baseline import build_baseline
from train.data.dataset import EncodedDataset
from train.reports import plots
from train.tasks import plugins
from train.tasks.plugins import code_of_config

MODEL = "models:/NAME@ALIAS, models:/NAME/VERSION, or the path of a bundle."
# Sections of the training options that this command accepts in addition to its own options.
MAY_CHANGE = ("compress", "data", "plugins", "registry", "storage", "workers")


class CompressOptions(CommandOptions):
    """Compress a trained model again with different compress.* options.

    `python -m train.compress add MODEL` adds a variant from an ONNX file;
    `python -m train.compress export MODEL` writes a variant for edge devices.
    """

    model_config = SettingsConfigDict(
        cli_prog_name="python -m train.compress", cli_ignore_unknown_args=True
    )

    model: CliPositionalArg[str] = Field(description=MODEL)
    training: CliUnknownArgs


class AddOptions(CompressOptions):
    """Add your own ONNX file to a model as a variant; it is benchmarked and judged like others."""

    model_config = SettingsConfigDict(cli_prog_name="python -m train.compress add")

    variant: str = Field(description="Name of the new variant: lowercase letters, digits, _ and -.")
    onnx: Path = Field(description="ONNX file of the new variant.")


class ExportOptions(CommandOptions):
    """Write a variant with its preprocessing for devices that do not have Halyard installed."""

    model_config = SettingsConfigDict(cli_prog_name="python -m train.compress export")

    model: CliPositionalArg[str] = Field(description=MODEL)
    to: Path = Field(description="Output folder.")
    variant: str | None = Field(
        None, description="Variant to export; default: the bundle's default variant."
    )
    storage: str = Field(
        "runs",
        validation_alias=AliasChoices("storage", "storage.path"),
        description="Directory or URL of the storage that contains the registry.",
    )
    plugins: list[str] = Field(
        [], description="Modules from which the bundle's custom classes may be imported."
    )


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the command and return its summary, which the caller prints as JSON."""
    match list(argv):
        case ["export", *rest]:
            return _export(rest)
        case ["add", *rest]:
            return _add(rest)
        case rest:
            return _again(rest)


def _export(argv: Sequence[str]) -> dict[str, Any]:
    options = parse_options(ExportOptions, argv)
    bundle = _load(options.model, options.storage, options.plugins)
    return export_edge.export_edge(bundle, options.variant, options.to)


def _add(argv: Sequence[str]) -> dict[str, Any]:
    options = parse_options(AddOptions, argv)
    if not re.fullmatch(storage.MODEL_NAME, options.variant):
        raise UserError(
            f"--variant is '{options.variant}'; expected lowercase letters, digits, _ and -."
        )
    if not options.onnx.is_file():
        raise UserError(f"--onnx is '{options.onnx}', which is not a file; give an ONNX file.")
    return _make(options.model, options.training, {options.variant: options.onnx})


def _again(argv: Sequence[str]) -> dict[str, Any]:
    options = parse_options(CompressOptions, argv)
    return _make(options.model, options.training, {})


def _make(model: str, argv: Sequence[str], own: Mapping[str, Path]) -> dict[str, Any]:
    """Build the variants of a model in a new bundle and register that bundle."""
    started = time.perf_counter()
    given = cli.read_options(argv)
    if wrong := sorted(given.keys() - set(MAY_CHANGE)):
        raise UserError(
            f"option --{wrong[0]} applies to training only; this command accepts options of "
            f"{', '.join(MAY_CHANGE)}."
        )
    path = given.get("storage", {}).get("path", "runs")
    # Classes named on the command line may be imported; classes named only in the bundle may not.
    named = [name.partition(":")[0] for name in code_of_config(given)]
    modules = sorted({*given.pop("plugins", []), *named})
    earlier = _load(model, path, modules)
    manifest = earlier.manifest
    values = cli.merge_options(bundle_config(manifest.config, modules), given)
    key = given.get("storage", {}).get("signing_key")
    signature.has_key(key)
    values["storage"] = {"path": path, "signing_key": key}
    values["resume"] = None
    if model.startswith(registry.SCHEME):
        # Training may have disabled registration. A model that came from the registry is registered
        # again unless the command line disables it.
        values["registry"]["enabled"] = given.get("registry", {}).get("enabled", True)
    config = validate_config(values)
    if taken := [name for name in own if name in manifest.variants or name in RECIPES]:
        raise UserError(f"'{manifest.name}' already has a variant '{taken[0]}'; give another name.")
    root = storage.resolve_path(path)
    data = _data(config, earlier, root)
    if config.registry.enabled:
        publishing.check_publishable(root, config.registry.metric)
    now = datetime.now(UTC)
    name = f"{manifest.name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}-compressed"
    location = storage.join_path(root, "bundles", name)
    with Bundle.create(location) as writer:
        # Copy only files that are listed in the manifest; their digests have been checked.
        report_files = [file for file in manifest.files if file.startswith("report/")]
        for file in (*report_files, FEATURES):
            shutil.copyfile(earlier.path / file, writer.file(file))
        net = _network(config, data, earlier, writer)
        made = compress(net, config, data, writer, root, earlier=earlier, own=own)
        wanted = [*own] or [name for name in config.compress.variants if name != "fp32"]
        if wanted and not any(_accepted(made.variants.get(name)) for name in wanted):
            raise CommandFailed(
                f"no variant was accepted; '{model}' is unchanged: "
                + "; ".join(
                    f"{name}: {made.variants[name].reason}"
                    if name in made.variants
                    else f"{name}: {made.skipped[name]}"
                    for name in wanted
                )
            )
        writer.json(BASELINE, build_baseline(data, made.outputs["valid"]))
        test = *data.open("test"), made.outputs["test"]
        plots.plot_predictions(data.task, *test, writer.file)
        compressed = manifest.model_copy(
            update={
                "created": now.isoformat(timespec="seconds"),
                "files": writer.files(),
                "config": config.model_dump(mode="json"),
                **made.fields,
            }
        )
        writer.commit(reports.write_card(writer, compressed, *test), key)
    bundle = Bundle.load(location)
    summary = publishing.bundle_summary(bundle) | {
        "seconds": round(time.perf_counter() - started, 3)
    }
    if not config.registry.enabled:
        return summary
    with publishing.RunRecorder(root, config.name, bundle.manifest.config) as recording:
        published = publishing.publish(
            bundle,
            recording,
            root,
            config.registry.metric,
            score=functools.partial(validation_score, config),
        )
    return summary | published


def _accepted(variant: Any) -> bool:
    return variant is not None and variant.accepted


def _load(model: str, path: str, modules: Sequence[str]) -> Bundle:
    """Load a bundle. modules: modules from which its custom classes may be imported."""
    root = storage.resolve_path(path)
    plugins.allow_modules(modules, storage=None if storage.is_url(root) else root)
    try:
        return registry.load_bundle(model, root)[0]
    except (CorruptBundle, ValueError) as error:
        raise UserError(str(error)) from error


def _network(
    config: Config, data: EncodedDataset, earlier: Bundle, writer: BundleWriter
) -> nn.Module | Path:
    """Return the model's network, or the ONNX file of an imported model; copy its weights.

    Raises UserError if the config does not fit the data.
    """
    if earlier.manifest.imported is not None:
        return earlier.path / earlier.manifest.variants["fp32"].file
    shutil.copyfile(earlier.path / WEIGHTS, writer.file(WEIGHTS))
    try:
        net = nets.create_net(config.net, data.task)
    except ValueError as error:
        raise UserError(str(error)) from error
    net.load_state_dict(safetensors.torch.load_file(writer.path / WEIGHTS))
    return net


def _data(config: Config, bundle: Bundle, root: str) -> EncodedDataset:
    """Return the encoded records of training. Raises UserError if the data have changed."""
    connect.connect(num_cpus=config.workers.all_cpus, metrics=False)
    fitted = config.init is not None or bundle.manifest.imported is not None
    data = dataset.prepare_dataset(config, root, bundle.task if fitted else None)
    check_calibration(config, data.task)
    if data.summary["digest"] != bundle.manifest.data["digest"]:
        raise UserError(
            f"'{config.data.train}' no longer contains the records that '{bundle.manifest.name}' "
            "was trained on; give their location with --data.train and --data.test."
        )
    return data.with_task(bundle.task)


if __name__ == "__main__":
    run_command(main)
