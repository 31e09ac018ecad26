"""python -m train.compress: compress a model again, add a variant, export one for the edge.

python -m train.compress MODEL [--compress.option VALUE …]
python -m train.compress add MODEL --variant NAME --onnx FILE
python -m train.compress export MODEL --to DIR [--variant NAME]
"""

import argparse
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from cluster import connect, storage

connect.prepare_environment()

from cluster.errors import Failed, UserError, run_command
from train import card, commandline, nets, report
from train.bundle import Bundle, CorruptBundle, registry
from train.bundle.bundle import BASELINE, FEATURES, WEIGHTS
from train.compress import compress, edge
from train.compress.recipes import RECIPES, check_calibration
from train.config import Config, of_bundle, validate
from train.data import shards
from train.data.baseline import baseline
from train.data.shards import Shards
from train.tasks import plugins
from train.tasks.plugins import code_of_config

# What may be given besides compress.…: where things are, and who works.
NAME = "[a-z0-9][a-z0-9_-]{0,62}"
MAY_CHANGE = ("compress", "data", "plugins", "registry", "storage", "workers")


def main(argv: Sequence[str]) -> dict[str, Any]:
    match list(argv):
        case ["export", *rest]:
            return _export(rest)
        case ["add", *rest]:
            return _add(rest)
        case rest:
            return _again(rest)


def _export(argv: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m train.compress export")
    parser.add_argument("model", help="models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle")
    parser.add_argument("--to", required=True, type=Path, help="folder to write")
    parser.add_argument("--variant", help="the bundle's default if not given")
    parser.add_argument("--storage.path", dest="storage", default="runs", help="with the registry")
    parser.add_argument("--plugins", default="", help="modules whose classes the bundle may name")
    options = parser.parse_args(argv)
    modules = [name for name in options.plugins.split(",") if name]
    bundle = _load(options.model, options.storage, modules)
    return edge.export(bundle, options.variant, options.to)


def _add(argv: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m train.compress add")
    parser.add_argument("model", help="models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle")
    parser.add_argument("--variant", required=True, help="the new variant's name")
    parser.add_argument("--onnx", required=True, type=Path, help="its file")
    options, rest = parser.parse_known_args(argv)
    if not re.fullmatch(NAME, options.variant):
        raise UserError(
            f"--variant is '{options.variant}'; expected small letters, digits, _ and -."
        )
    if not options.onnx.is_file():
        raise UserError(f"--onnx is '{options.onnx}', which is no file; give an ONNX file.")
    return _make(options.model, rest, {options.variant: options.onnx})


def _again(argv: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m train.compress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle")
    options, rest = parser.parse_known_args(argv)
    return _make(options.model, rest, {})


def _make(model: str, argv: Sequence[str], own: Mapping[str, Path]) -> dict[str, Any]:
    """Make a model's variants anew, in a bundle of their own, and register it."""
    started = time.perf_counter()
    given = commandline.given(argv)
    if wrong := sorted(given.keys() - set(MAY_CHANGE)):
        raise UserError(
            f"option --{wrong[0]} belongs to training; accepted are those of "
            f"{', '.join(MAY_CHANGE)}."
        )
    path = given.get("storage", {}).get("path", "runs")
    # What the command line itself names counts as named, what the bundle names does not.
    named = [name.partition(":")[0] for name in code_of_config(given)]
    modules = sorted({*given.pop("plugins", []), *named})
    earlier = _load(model, path, modules)
    manifest = earlier.manifest
    values = commandline.merge(of_bundle(manifest.config, modules), given)
    values["storage"]["path"], values["resume"] = path, None
    if model.startswith(registry.SCHEME):
        # Its training may have left registering to another; what is in the registry stays in it.
        values["registry"]["enabled"] = given.get("registry", {}).get("enabled", True)
    config = validate(values)
    if taken := [name for name in own if name in manifest.variants or name in RECIPES]:
        raise UserError(f"'{manifest.name}' has a variant '{taken[0]}' already; give another name.")
    root = storage.resolve(path)
    data = _data(config, earlier, root)
    if config.registry.enabled:
        registry.check(root, config.registry.metric)
    now = datetime.now(UTC)
    name = f"{manifest.name}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}-compressed"
    location = storage.join(root, "bundles", name)
    with Bundle.create(location) as writer:
        # Only what the manifest lists, and has been checked.
        report_files = [file for file in manifest.files if file.startswith("report/")]
        for file in (*report_files, WEIGHTS, FEATURES):
            shutil.copyfile(earlier.path / file, writer.file(file))
        net = _built(config, data)
        net.load_state_dict(safetensors.torch.load_file(writer.path / WEIGHTS))
        made = compress(net, config, data, writer, root, earlier=earlier, own=own)
        wanted = [*own] or [name for name in config.compress.variants if name != "fp32"]
        if wanted and not any(_accepted(made.variants.get(name)) for name in wanted):
            raise Failed(
                f"no variant was accepted, and '{model}' stays as it is: "
                + "; ".join(
                    f"{name}: {made.variants[name].reason}"
                    if name in made.variants
                    else f"{name}: {made.skipped[name]}"
                    for name in wanted
                )
            )
        writer.json(BASELINE, baseline(data, made.outputs["valid"]))
        test = *data.open("test"), made.outputs["test"]
        report.predictions(data.task, *test, writer.file)
        compressed = manifest.model_copy(
            update={
                "created": now.isoformat(timespec="seconds"),
                "files": writer.files(),
                "config": config.model_dump(mode="json"),
                **made.fields,
            }
        )
        writer.commit(card.write(writer, compressed, *test))
    bundle = Bundle.load(location)
    summary = registry.summary(bundle) | {"seconds": round(time.perf_counter() - started, 3)}
    if not config.registry.enabled:
        return summary
    with registry.Recording(root, config.name, bundle.manifest.config) as recording:
        published = registry.publish(bundle, recording, root, config.registry.metric)
    return summary | published


def _accepted(variant: Any) -> bool:
    return variant is not None and variant.accepted


def _load(model: str, path: str, modules: Sequence[str]) -> Bundle:
    """modules: whose classes the bundle may name."""
    root = storage.resolve(path)
    plugins.allow(modules, storage=None if storage.is_url(root) else root)
    try:
        return registry.load(model, root)[0]
    except (CorruptBundle, ValueError) as error:
        raise UserError(str(error)) from error


def _built(config: Config, data: Shards) -> nn.Module:
    """The model's net. Raises UserError where its class is not there."""
    try:
        return nets.build(config.net, data.task)
    except ValueError as error:
        raise UserError(str(error)) from error


def _data(config: Config, bundle: Bundle, root: str) -> Shards:
    """The encoded records that the model was trained on. Raises UserError for others."""
    connect.connect(num_cpus=config.workers.all_cpus, metrics=False)
    data = shards.prepare(config, root, bundle.task if config.init else None)
    check_calibration(config, data.task)
    if data.summary["digest"] != bundle.manifest.data["digest"]:
        raise UserError(
            f"'{config.data.train}' no longer holds the records that '{bundle.manifest.name}' was "
            "trained on; give --data.train, and --data.test, where they are."
        )
    return data


if __name__ == "__main__":
    run_command(main)
