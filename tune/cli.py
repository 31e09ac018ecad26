"""The command line and the file of a study: options in, a StudyConfig out."""

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
# What is searched of records that no study was written for.
ANY_TABLE = CONFIGS / "any.yaml"
BASE = "base"


class _Command(BaseSettings, StudyConfig):
    """Search training options, train on the best, compress it, and register it."""

    model_config = SettingsConfigDict(
        cli_prog_name="python tune/main.py",
        cli_avoid_json=True,
        cli_shortcuts={"tune.num_trials": "num-trials", "tune.max_minutes": "max-minutes"},
    )

    config: Path = Field(
        DEFAULT_STUDY.relative_to(CONFIGS.parents[1]),
        description="YAML file with the study under tune, and options of training, or base: a "
        "training config to begin from, relative to the file.",
    )


def parse(argv: Sequence[str]) -> StudyConfig:
    """Read `[--config FILE] [--option VALUE …]`; options win over the file, and it over its base.

    Raises UserError with one line that names the field.
    """
    options = read_options(argv, _Command)
    file = options.pop("config", None)
    train = options.get("data", {}).get("train")
    if file is None and train is not None:
        values = load_yaml(ANY_TABLE)
    else:
        values = load_study_file(Path(file or DEFAULT_STUDY))
    if "space" in options.get("tune", {}):
        values = merge_options(values, {"tune": {}})
        values["tune"].pop("space", None)  # one space in place of another, not both
    config = validate_as(StudyConfig, merge_options(values, options))
    if config.resume is not None:
        raise UserError("resume is for a single run; the same command continues a study.")
    if config.init is not None:
        raise UserError("init is for a single run; the nets of a study begin from nothing.")
    changing = config.tune.scheduling == "pbt"
    search_space.check_space(config.tune.space, training_config(config), changing=changing)
    return config


def training_config(config: StudyConfig) -> Config:
    """The training config of a study."""
    return Config.model_validate(
        config.model_dump(mode="json", exclude={"tune"}, exclude_unset=True)
    )


def load_study_file(path: Path) -> dict[str, Any]:
    """Return the options of a study's file over those of its base. Raises UserError."""
    values = load_yaml(path)
    base = values.pop(BASE, None)
    return values if base is None else merge_options(load_yaml(path.parent / base), values)
