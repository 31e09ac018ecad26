"""The bundle that a run begins from: its options, and its task as it was fitted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from train.bundle import Bundle, CorruptBundle, registry
from train.config import Config, bundle_config, validate_config
from train.values.records import shorten

# What fits a bundle's weights, and is taken over with them.
OF_THE_TASK = ("target", "task_type", "features", "task", "text")


@dataclass(frozen=True)
class CompletedConfig:
    """The options of a run with nothing left open, and the bundle that it begins from, if any."""

    config: Config
    init_bundle: Bundle | None = None


def inherit_options(config: Config) -> tuple[Config, Bundle]:
    """Return the options with those that the bundle `init` decides, and the bundle.

    `init` names a version afterwards: an alias may move on, a version does not. Raises UserError
    for a bundle that is not there or not complete, and for an option of the task that is given and
    differs from the bundle's.
    """
    assert config.init is not None
    try:
        bundle, version = registry.load_bundle(config.init, config.storage.root)
    except CorruptBundle as error:
        raise UserError(f"init is '{config.init}': {error}") from error
    init = bundle.location
    if config.init.startswith(registry.SCHEME):
        init = f"{registry.SCHEME}{registry.model_name(config.init)}/{version}"
    own = validate_config(bundle_config(bundle.manifest.config, config.plugins))
    for name in OF_THE_TASK:
        came, wanted = getattr(config, name), getattr(own, name)
        if name in config.model_fields_set and came and came != wanted:
            raise UserError(
                f"init is '{config.init}', whose option '{name}' is {_shown(wanted)}, not "
                f"{_shown(came)}; leave {name} out, or train without init."
            )
    given = {**config.model_dump(mode="json", exclude_unset=True), "init": init}
    inherited = own.model_dump(mode="json", include={*OF_THE_TASK, "net"})
    for name in ("decision_rule", "quantile"):
        if name not in given:
            inherited |= own.model_dump(mode="json", include={name})
    return validate_config(fill_missing(given, inherited)), bundle


def _shown(value: Any) -> str:
    """The names of columns, and what else an option may be."""
    return ", ".join(value) if isinstance(value, dict) else shorten(value)


def fill_missing(given: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given, and what was found where nothing is."""
    merged = dict(given)
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = fill_missing(merged[key], value)
        else:
            merged.setdefault(key, value)
    return merged
