"""python -m train.pretrained: convert a checkpoint with pickled weights to safetensors."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
import safetensors.torch
from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from cluster import commit
from cluster.cli import CommandOptions, parse_options, run_command
from cluster.errors import UserError, error_line
from train.nets.pretrained.backbones import build_backbone, read_weights
from train.nets.pretrained.checkpoints import (
    CARD,
    CONFIG,
    PICKLES,
    POOLING,
    PREPROCESSOR,
    TIMM,
    TOKENIZER,
    WEIGHTS,
)
from train.nets.pretrained.hub import find_checkpoint
from train.nets.pretrained.torchvision_operators import declare_operators
from train.pretrained.unpickle import ORDER

UNPICKLE = Path(__file__).with_name("unpickle.py")
KEPT = ("input_size", "mean", "std", "interpolation", "crop_pct")


class ConvertOptions(CommandOptions):
    """Convert a checkpoint with pickled weights to one that net.pretrained accepts.

    A pickle can run code when it is read. It is read here in a process of its own, by PyTorch's
    restricted unpickler; convert only files from a source that you trust all the same.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m train.pretrained")

    checkpoint: CliPositionalArg[Path] = Field(
        description="Folder of a checkpoint, or a file with pickled weights."
    )
    to: Path = Field(description="New folder for the converted checkpoint.")
    timm: str | None = Field(
        None, description="Name of the model of timm that the weights are of, if no file says it."
    )
    match_order: bool = Field(
        False,
        description="Name the weights as the model of timm does, in their order; all shapes must "
        "be equal.",
    )


def main(argv: Sequence[str]) -> dict[str, Any]:
    return convert(parse_options(ConvertOptions, argv))


def convert(options: ConvertOptions) -> dict[str, Any]:
    """Write the converted checkpoint, and return its folder, digest and number of weights.

    Raises UserError if the files cannot be converted, or are not a checkpoint then.
    """
    if not options.checkpoint.exists():
        raise UserError(f"'{options.checkpoint}' does not exist; give a folder or a file.")
    if options.to.exists():
        raise UserError(f"'{options.to}' exists; give --to a new folder.")
    with TemporaryDirectory(prefix="convert-") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        _copy_files(options, folder)
        _unpickle(_pickles(options.checkpoint), folder / WEIGHTS)
        if options.match_order:
            _rename(folder)
        try:
            checkpoint = find_checkpoint(str(folder))
            count = len(read_weights(checkpoint))
        except UserError as error:
            told = str(error).replace(str(folder), str(options.checkpoint)).rstrip(".")
            named = options.match_order or options.timm is None
            hint = "" if named else "; if they are in the model's order, give --match-order"
            raise UserError(f"{told}{hint}.") from error
        with commit.atomic_folder(str(options.to.absolute())) as made:
            for path in folder.rglob("*"):
                if path.is_file():
                    target = made / path.relative_to(folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)
        return {
            "checkpoint": str(options.to),
            "kind": checkpoint.kind,
            "weights": count,
            "sha256": checkpoint.digest,
        }


def _pickles(checkpoint: Path) -> list[Path]:
    if checkpoint.is_file():
        return [checkpoint]
    found = [path for pattern in PICKLES for path in sorted(checkpoint.glob(pattern))]
    if not found:
        raise UserError(f"'{checkpoint}' has no pickled weights ({', '.join(PICKLES)}).")
    # Beside the weights there may be the state of an optimizer or the arguments of a training.
    weights = [path for path in found if path.stem.startswith(("pytorch_model", "model"))]
    return weights or found


def _copy_files(options: ConvertOptions, folder: Path) -> None:
    """Copy the files beside the weights, or write the configuration of a model of timm."""
    if options.timm is not None:
        declare_operators()
        try:
            import timm
        except ImportError as error:
            raise UserError(
                "--timm needs timm; install it with: pip install 'halyard[vision]'."
            ) from error
        known = None
        with suppress(RuntimeError):  # an unknown tag of a known model
            known = timm.get_pretrained_cfg(options.timm)
        if known is None:
            raise UserError(f"--timm is '{options.timm}', which timm does not know.")
        facts = {key: known.to_dict()[key] for key in KEPT}
        config = {"architecture": options.timm, "pretrained_cfg": facts}
        (folder / CONFIG).write_text(json.dumps(config, indent=2))
        return
    source = options.checkpoint
    if not (source / CONFIG).is_file():
        raise UserError(
            f"'{source}' has no {CONFIG}; give a folder that has one, or the name of a model with "
            "--timm."
        )
    for name in (CONFIG, TOKENIZER, PREPROCESSOR, POOLING, CARD):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _unpickle(sources: Sequence[Path], target: Path) -> None:
    command = [sys.executable, "-I", str(UNPICKLE), str(target), *map(str, sources)]
    # The process gets none of this one's environment, such as passwords.
    env = {"PATH": os.environ.get("PATH", "")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise UserError(f"'{sources[0]}' cannot be read as weights: {reason[:300]}")


def _rename(folder: Path) -> None:
    """Give weights the names of their model, in order."""
    with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in json.loads(file.metadata()[ORDER])}
    architecture = json.loads((folder / CONFIG).read_text())
    try:
        wanted = build_backbone({TIMM: architecture["architecture"]}).state_dict()
    except (ValueError, KeyError) as error:
        raise UserError(f"--match-order needs a model of timm: {error_line(error)}") from error
    renamed = {}
    for (name, value), (old, weight) in zip(wanted.items(), found.items(), strict=False):
        if value.shape != weight.shape:
            raise UserError(
                f"--match-order: '{old}' is {list(weight.shape)}, and '{name}' of the model is "
                f"{list(value.shape)}."
            )
        renamed[name] = weight
    safetensors.torch.save_file(renamed, folder / WEIGHTS)


if __name__ == "__main__":
    run_command(main)
