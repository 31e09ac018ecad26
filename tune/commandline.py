"""The command line and the file of a study: options in, a StudyConfig out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from cluster.errors import UserError
from train.commandline import given, load_yaml, merge, name_of
from train.config import Config, validate_as
from tune import space
from tune.config import StudyConfig

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_STUDY = CONFIGS / "digits.yaml"
# What is searched of records that no study was written for.
ANY_TABLE = CONFIGS / "any.yaml"
BASE = "base"
# Short names of options: how they are given, and where they belong.
SHORT = {"num-trials": "num_trials", "max-minutes": "max_minutes"}


class _Command(BaseSettings, StudyConfig):
    """Search training options, train on the best, compress it, and register it."""

    model_config = SettingsConfigDict(cli_prog_name="python tune/main.py", cli_avoid_json=True)

    config: Path = Field(
        DEFAULT_STUDY.relative_to(CONFIGS.parents[1]),
        description="YAML file with the study under tune, and options of training, or base: a "
        "training config to begin from, relative to the file.",
    )
    num_trials: int | None = Field(
        None, validation_alias="num-trials", description="Trials in all: tune.num_trials."
    )
    max_minutes: float | None = Field(
        None,
        validation_alias="max-minutes",
        description="Stop after so long; the same command goes on: tune.max_minutes.",
    )


def parse(argv: Sequence[str]) -> StudyConfig:
    """Read `[--config FILE] [--option VALUE …]`; options win over the file, and it over its base.

    Raises UserError with one line that names the field.
    """
    options = given(argv, _Command)
    for short, name in SHORT.items():
        if short in options:
            options = merge(options, {"tune": {name: options.pop(short)}})
    file = options.pop("config", None)
    train = options.get("data", {}).get("train")
    if file is None and train is not None:
        values = merge({"name": name_of(train)}, load_yaml(ANY_TABLE))
    else:
        values = load(Path(file or DEFAULT_STUDY))
    if "space" in options.get("tune", {}):
        values = merge(values, {"tune": {}})
        values["tune"].pop("space", None)  # one space in place of another, not both
    config = validate_as(StudyConfig, merge(values, options))
    if config.resume is not None:
        raise UserError("resume is for a single run; the same command continues a study.")
    if config.init is not None:
        raise UserError("init is for a single run; the nets of a study begin from nothing.")
    changing = config.tune.scheduling == "pbt"
    space.check(config.tune.space, training(config), changing=changing)
    return config


def training(config: StudyConfig) -> Config:
    """The training config of a study."""
    return Config.model_validate(
        config.model_dump(mode="json", exclude={"tune"}, exclude_unset=True)
    )


def load(path: Path) -> dict[str, Any]:
    """Return the options of a study's file over those of its base. Raises UserError."""
    values = load_yaml(path)
    base = values.pop(BASE, None)
    return values if base is None else merge(load_yaml(path.parent / base), values)
