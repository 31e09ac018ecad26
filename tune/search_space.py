"""The search space: training options by dotted name, and the values that each can have."""

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

# Options that can be searched: how a model is trained, but not its task, data or evaluation.
SEARCHED = (
    *("seed", "precision", "compile", "activation_checkpointing"),
    *("net", "optim", "augment", "stop"),
)
# Options that can change during a run: they affect neither the weights' shapes nor the steps.
CHANGEABLE = (
    *("optim.lr", "optim.vector_lr", "optim.head_lr", "optim.momentum", "optim.weight_decay"),
    *("optim.clip_norm", "optim.label_smoothing", "net.dropout", "net.text_dropout"),
    *("augment.flip", "augment.translate", "augment.crop_area", "augment.cutout"),
    *("augment.mixup", "augment.cutmix"),
)
# Position in a range of a value that is tried to check whether the option accepts fractions.
INSIDE = 0.618
# A perturbation's step as a share of the value, and its least step as a share of the range.
PERTURBATION, LEAST_STEP = 0.2, 0.01
# The probability that a perturbation draws a new value instead.
RESAMPLED_SHARE = 0.25
Values = dict[str, Any]


class Dimension(Section):
    """The values that an option can have. Exactly one of the fields is given."""

    uniform: tuple[float, float] | None = Field(
        None, description="A number from low to high, uniformly distributed."
    )
    loguniform: tuple[float, float] | None = Field(
        None, description="A number from low to high whose logarithm is uniformly distributed."
    )
    integer: tuple[int, int] | None = Field(
        None, description="A whole number from low to high, uniformly distributed."
    )
    loginteger: tuple[int, int] | None = Field(
        None,
        description="A whole number from low to high whose logarithm is uniformly distributed.",
    )
    choice: tuple[Any, ...] | None = Field(None, description="One of the values in a list.")

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
            raise ValueError(f"{low:g} to {high:g} is not a range; give the lower end first")
        if self.is_log and low <= 0:
            raise ValueError(f"the lower end is {low:g}; expected a number above 0 for a logarithm")
        return self

    @property
    def is_log(self) -> bool:
        """Whether values are distributed on a logarithmic scale."""
        return self.loguniform is not None or self.loginteger is not None

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end of a range."""
        found = self.uniform or self.loguniform or self.integer or self.loginteger
        assert found is not None
        return found

    @property
    def tried(self) -> list[Any]:
        """Values to try in order to check that the option accepts the whole dimension."""
        if self.choice is not None:
            return list(self.choice)
        low, high = self.ends
        inside = low + INSIDE * (high - low)
        return [low, high, inside if self._is_float else round(inside)]

    @property
    def _is_float(self) -> bool:
        return self.uniform is not None or self.loguniform is not None

    def distribution(self) -> BaseDistribution:
        """Return Optuna's distribution. A choice that is not a plain value is encoded as JSON."""
        if self.choice is not None:
            return CategoricalDistribution([_named(value) for value in self.choice])
        low, high = self.ends
        if self._is_float:
            return FloatDistribution(low, high, log=self.is_log)
        return IntDistribution(int(low), int(high), log=self.is_log)

    def value(self, raw: Any) -> Any:
        """Return the option's value for a value of Optuna."""
        if self.choice is None:
            return raw
        return next(value for value in self.choice if _named(value) == raw)

    def raw(self, value: Any) -> Any:
        """Return Optuna's value for an option's value. Raises ValueError if it is not in the space.

        The inverse of `value`.
        """
        if self.choice is not None:
            for choice in self.choice:
                if _plain(choice) == _plain(value):
                    return _named(choice)
        elif isinstance(value, int | float) and self.ends[0] <= value <= self.ends[1]:
            return value
        raise ValueError(f"{value!r} is not in the space")

    def place(self, value: Any) -> float:
        """Return the position of a value between the ends, or of a choice in the list, 0 to 1."""
        if self.choice is not None:
            at = [_plain(choice) for choice in self.choice].index(_plain(value))
            return at / max(len(self.choice) - 1, 1)
        low, high = self.ends
        if self.is_log:
            return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return (value - low) / (high - low)

    def perturbed(self, value: Any, rng: np.random.Generator) -> Any:
        """Return a value near the given one: 20% more or less, the next choice, or a new draw.

        As in population based training (Jaderberg et al. 2017), but always within the ends: at an
        end, the step goes inwards. A step is at least 1% of the range on a linear scale, and at
        least 1 for whole numbers.
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
        # Half a number is added at both ends, so that rounding gives the ends their full share.
        around = 0.0 if self._is_float else 0.5
        if self.is_log:
            drawn = math.exp(rng.uniform(math.log(low - around), math.log(high + around)))
        else:
            drawn = rng.uniform(low - around, high + around)
        drawn = min(max(drawn, low), high)
        return drawn if self._is_float else round(drawn)


def _moved(value: float, step: float, low: float, high: float, rng: np.random.Generator) -> float:
    """Move a value a step up or down at random, or the other way if it is already at that end."""
    signs = [-1, 1] if rng.random() < 0.5 else [1, -1]
    moved = [float(np.clip(value + sign * step, low, high)) for sign in signs]
    return moved[0] if moved[0] != value else moved[1]


Space = dict[str, Dimension]


def nest_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options nested by section, given options by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        part: dict[str, Any] = {field: value}
        for section in reversed(sections):
            part = {section: part}
        found = merge_options(found, part)
    return found


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a config with some options changed. Raises UserError if the result is not valid."""
    return validate_config(
        merge_options(config.model_dump(mode="json", exclude_unset=True), nest_options(values))
    )


def check_space(space: Space, config: Config, *, changing: bool) -> None:
    """Check that each option in a space exists, can be searched, and accepts all values.

    changing: whether options change in the middle of a run. Raises UserError for the first problem.
    """
    for name, dimension in space.items():
        if name.split(".")[0] not in SEARCHED:
            raise UserError(
                f"tune.space: '{name}' cannot be searched; accepted are options of "
                f"{', '.join(SEARCHED)}."
            )
        if changing and name not in CHANGEABLE:
            raise UserError(
                f"tune.space: '{name}' cannot change in the middle of a run, as pbt requires; "
                f"accepted are {', '.join(CHANGEABLE)}."
            )
        for value in dimension.tried:
            try:
                with_values(config, {name: value})
            except UserError as error:
                raise UserError(f"tune.space: {error}") from error


def current_values(config: Config, space: Space) -> Values:
    """Return a config's own values of the searched options, except those outside the space."""
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
    """Return a value for comparisons that distinguish types: True is not 1."""
    value = list(value) if isinstance(value, tuple) else value
    return type(value), value
