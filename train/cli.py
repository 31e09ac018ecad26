"""Read the options of training from the command line and a YAML file into a Config."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from cluster.cli import read_arguments
from cluster.errors import UserError
from train.config import Config, validate_config
from train.config.files import load_yaml, merge_options

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = CONFIGS / "digits.yaml"
SAVE_CONFIG = "save-config"
# Options that most users need, in the order of --help.
COMMON = (
    *("--config", "--data.train", "--target", "--name", "--data.test", "--optim.epochs"),
    *("--optim.lr", "--workers.num", "--resume", "--storage.path"),
)
# --storage is the short form of --storage.path; other commands only have --storage.
STORAGE = re.compile(r"^--storage(=|$)")


class _Command(BaseSettings, Config):
    """Train a model, compress it, and register it."""

    model_config = SettingsConfigDict(cli_prog_name="python train/main.py", cli_avoid_json=True)

    config: Path = Field(
        DEFAULT_CONFIG.relative_to(CONFIGS.parents[1]),
        description="YAML file with options. If it is not given but data.train is, options are "
        "inferred from the records.",
    )
    save_config: Path | None = Field(
        None,
        validation_alias=SAVE_CONFIG,
        description="Write the options, including the inferred ones, to this YAML file.",
    )


class Command(NamedTuple):
    """The parsed command line: the config, and the path to save it to, if any."""

    config: Config
    save_to: Path | None


def parse(argv: Sequence[str]) -> Command:
    """Read `[--config FILE] [--dotted.option VALUE …]`; options override the file.

    Raises UserError with a one-line message that names the field.
    """
    options = read_options(argv)
    file = options.pop("config", None)
    save_to = options.pop(SAVE_CONFIG, None)
    train = options.get("data", {}).get("train")
    if file is None and train is not None:
        base: dict[str, Any] = {}
    else:
        base = load_yaml(file or DEFAULT_CONFIG)
    return Command(
        validate_config(merge_options(base, options)), Path(save_to) if save_to else None
    )


def read_options(
    argv: Sequence[str],
    command: type[BaseSettings] = _Command,
    common: Sequence[str] = COMMON,
) -> dict[str, Any]:
    """Return the options of a command line, grouped by section.

    common: options that --help lists first. Raises UserError for an unknown option.
    """
    arguments = [STORAGE.sub(r"--storage.path\1", given) for given in argv]
    return read_arguments(command, arguments, common=common)


def save_config(config: Config, path: Path) -> None:
    """Write the options that are set, without defaults, to a YAML file.

    Raises UserError if the file cannot be written.
    """
    values = config.model_dump(mode="json", exclude_unset=True)
    try:
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise UserError(
            f"config file '{path}' cannot be written: {error.strerror}; give another path."
        ) from error
