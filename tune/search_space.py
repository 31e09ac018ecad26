"""The search space: options of training by their dotted names, and what each may be."""

import json
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import Field, model_validator

from cluster.errors import UserError
from train.cli import merge_options
from train.config import Config, Section, validate_config

# What a search may change: how a model is learned, not what is learned or how that is judged.
SEARCHED = (
    *("seed", "precision", "compile", "activation_checkpointing"),
    *("net", "optim", "augment", "stop"),
)
# What may change in the middle of a run, whose weights and steps stay what they are.
CHANGEABLE = (
    *("optim.lr", "optim.vector_lr", "optim.head_lr", "optim.momentum", "optim.weight_decay"),
    *("optim.clip_norm", "optim.label_smoothing", "net.dropout", "net.text_dropout"),
    *("augment.flip", "augment.translate", "augment.crop_area", "augment.cutout"),
    *("augment.mixup", "augment.cutmix"),
)
# Where between the ends of a range a value is tried, to see whether fractions are accepted.
INSIDE = 0.618
PERTURBATION, LEAST_STEP = 0.2, 0.01
RESAMPLED_SHARE = 0.25
Values = dict[str, Any]


class Dimension(Section):
    """What one option may be; one of these is given."""

    uniform: tuple[float, float] | None = Field(None, description="A number from low to high.")
    loguniform: tuple[float, float] | None = Field(
        None, description="A number whose logarithm is uniform, from low to high."
    )
    integer: tuple[int, int] | None = Field(None, description="A whole number, low to high.")
    loginteger: tuple[int, int] | None = Field(
        None, description="A whole number whose logarithm is uniform, low to high."
    )
    choice: tuple[Any, ...] | None = Field(None, description="One of a list.")

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(f"expected one of {kinds}; {len(given)} are given")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("the list to choose from is empty")
            return self
        low, high = self.ends
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"from {low:g} to {high:g} is no range; give the lower end first")
        if self.is_log and low <= 0:
            raise ValueError(f"a logarithm needs a low end above 0, not {low:g}")
        return self

    @property
    def is_log(self) -> bool:
        return self.loguniform is not None or self.loginteger is not None

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of a range."""
        found = self.uniform or self.loguniform or self.integer or self.loginteger
        assert found is not None
        return found

    @property
    def tried(self) -> list[Any]:
        """Values that show whether the option accepts all of them."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.ends
        inside = low + INSIDE * (high - low)
        return [low, high, inside if self._is_float else round(inside)]

    @property
    def _is_float(self) -> bool:
        return self.uniform is not None or self.loguniform is not None

    def distribution(self) -> BaseDistribution:
        """As Optuna has it; a choice that is no plain value is known to it by its JSON."""
        if self.choice is not None:
            return CategoricalDistribution([_named(value) for value in self.choice])
        low, high = self.ends
        if self._is_float:
            return FloatDistribution(low, high, log=self.is_log)
        return IntDistribution(int(low), int(high), log=self.is_log)

    def value(self, raw: Any) -> Any:
        """The option's value for one of Optuna's."""
        if self.choice is None:
            return raw
        return next(value for value in self.choice if _named(value) == raw)

    def raw(self, value: Any) -> Any:
        """The inverse of `value`. Raises ValueError for one that is not in the space."""
        if self.choice is not None:
            for choice in self.choice:
                if _plain(choice) == _plain(value):
                    return _named(choice)
        elif isinstance(value, int | float) and self.ends[0] <= value <= self.ends[1]:
            return value
        raise ValueError(f"{value!r} is not in the space")

    def place(self, value: Any) -> float:
        """Where a value lies between the ends, 0 to 1; of a choice, by its place in the list."""
        if self.choice is not None:
            at = [_plain(choice) for choice in self.choice].index(_plain(value))
            return at / max(len(self.choice) - 1, 1)
        low, high = self.ends
        if self.is_log:
            return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return (value - low) / (high - low)

    def perturbed(self, value: Any, rng: np.random.Generator) -> Any:
        """Another value near one: a fifth more or less, the next choice, or drawn anew.

        As in population based training (Jaderberg et al. 2017), within the ends. Of values not on a
        scale of logarithms a step is at least a hundredth of the range, and of whole numbers 1; at
        an end it goes inwards.
        """
        if rng.random() < RESAMPLED_SHARE:
            return self._drawn(rng)
        if self.choice is not None:
            at = [_plain(choice) for choice in self.choice].index(_plain(value))
            known = {float(place): choice for place, choice in enumerate(self.choice)}
            return known[_moved(at, 1, 0, len(self.choice) - 1, rng)]
        low, high = self.ends
        step = PERTURBATION * abs(value)
        if not self.is_log:
            step = max(step, LEAST_STEP * (high - low))
        if self._is_float:
            return _moved(value, step, low, high, rng)
        return round(_moved(value, max(round(step), 1), low, high, rng))

    def _drawn(self, rng: np.random.Generator) -> Any:
        if self.choice is not None:
            return self.choice[int(rng.integers(len(self.choice)))]
        low, high = self.ends
        # Half of a whole number beyond the ends rounds to them, as around any other.
        around = 0.0 if self._is_float else 0.5
        if self.is_log:
            drawn = math.exp(rng.uniform(math.log(low - around), math.log(high + around)))
        else:
            drawn = rng.uniform(low - around, high + around)
        drawn = min(max(drawn, low), high)
        return drawn if self._is_float else round(drawn)


def _moved(value: float, step: float, low: float, high: float, rng: np.random.Generator) -> float:
    """The value a step up or down, either as likely; where that ends at the value, the other."""
    signs = [-1, 1] if rng.random() < 0.5 else [1, -1]
    moved = [float(np.clip(value + sign * step, low, high)) for sign in signs]
    return moved[0] if moved[0] != value else moved[1]


Space = dict[str, Dimension]


def nest_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by section, of options by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        part: dict[str, Any] = {field: value}
        for section in reversed(sections):
            part = {section: part}
        found = merge_options(found, part)
    return found


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A config with some of its options changed. Raises UserError."""
    return validate_config(
        merge_options(config.model_dump(mode="json", exclude_unset=True), nest_options(values))
    )


def check_space(space: Space, config: Config, *, changing: bool) -> None:
    """Raises UserError for an option that is not there, is not searched, or has other bounds.

    changing: whether options change in the middle of a run.
    """
    for name, dimension in space.items():
        if name.split(".")[0] not in SEARCHED:
            raise UserError(
                f"tune.space: '{name}' is not searched; accepted are options of "
                f"{', '.join(SEARCHED)}."
            )
        if changing and name not in CHANGEABLE:
            raise UserError(
                f"tune.space: '{name}' cannot change in the middle of a run, as pbt does; accepted "
                f"are {', '.join(CHANGEABLE)}."
            )
        for value in dimension.tried:
            try:
                with_values(config, {name: value})
            except UserError as error:
                raise UserError(f"tune.space: {error}") from error


def current_values(config: Config, space: Space) -> Values:
    """The searched options as the config has them, those that lie in the space."""
    found: Values = {}
    for name, dimension in space.items():
        value: Any = config.model_dump(mode="json")
        for part in name.split("."):
            value = value[part] if isinstance(value, dict) else None
        try:
            dimension.raw(value)
        except ValueError:
            continue
        found[name] = value
    return found


def _named(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _plain(value: Any) -> tuple[type, Any]:
    """What tells values apart: True is not 1."""
    value = list(value) if isinstance(value, tuple) else value
    return type(value), value
