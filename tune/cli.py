"""Parsing of a study's command line and file into a StudyConfig."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from cluster.errors import UserError
from train.cli import read_options
from train.config import Config, validate_as
from train.config.files import load_yaml, merge_options
from tune import search_space
from tune.config import StudyConfig

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_STUDY = CONFIGS / "digits.yaml"
# The study that is used if only records are given.
ANY_TABLE = CONFIGS / "any.yaml"
BASE = "base"
# Options that most users need, in the order of --help.
COMMON = (
    *("--config", "--data.train", "--target", "--num-trials", "--max-minutes", "--tune.space"),
    *("--tune.objectives", "--tune.pick", "--tune.parallel", "--storage.path"),
)


class _Command(BaseSettings, StudyConfig):
    """Search training options for the best model, compress it and register it."""

    model_config = SettingsConfigDict(
        cli_prog_name="python tune/main.py",
        cli_avoid_json=True,
        cli_shortcuts={"tune.num_trials": "num-trials", "tune.max_minutes": "max-minutes"},
    )

    config: Path = Field(
        DEFAULT_STUDY.relative_to(CONFIGS.parents[1]),
        description="YAML file of the study: training options, the search under tune, and "
        "optionally base, the path of a training config to start from, relative to this file.",
    )


def parse(argv: Sequence[str]) -> StudyConfig:
    """Return the study that `[--config FILE] [--option VALUE …]` describes.

    Options override the file, and the file overrides its base. Raises UserError, with one line
    that names the field, if a value is wrong.
    """
    options = read_options(argv, _Command, COMMON)
    file = options.pop("config", None)
    train = options.get("data", {}).get("train")
    if file is None and train is not None:
        values = load_yaml(ANY_TABLE)
    else:
        values = load_study_file(Path(file or DEFAULT_STUDY))
    if "space" in options.get("tune", {}):
        values = merge_options(values, {"tune": {}})
        values["tune"].pop("space", None)  # a given space replaces the file's space
    config = validate_as(StudyConfig, merge_options(values, options))
    check_study(config)
    return config


def check_study(config: StudyConfig) -> None:
    """Raises UserError for options that a study cannot have, or a space that does not fit them."""
    if config.resume is not None:
        raise UserError("resume is for a single run; to continue a study, run the same command.")
    if config.init is not None:
        raise UserError("init is for a single run; trials start from random weights. Leave it out.")
    changing = config.tune.scheduling == "pbt"
    search_space.check_space(config.tune.space, training_config(config), changing=changing)


def training_config(config: StudyConfig) -> Config:
    """Return the training config of a study."""
    return Config.model_validate(
        config.model_dump(mode="json", exclude={"tune"}, exclude_unset=True)
    )


def load_study_file(path: Path) -> dict[str, Any]:
    """Return the options of a study's file, merged over those of its base.

    Raises UserError if a file cannot be read.
    """
    values = load_yaml(path)
    base = values.pop(BASE, None)
    return values if base is None else merge_options(load_yaml(path.parent / base), values)
