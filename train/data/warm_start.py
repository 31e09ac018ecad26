"""Warm start: the options and the fitted task that a run inherits from its `init` bundle."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError
from train.bundle import Bundle, CorruptBundle, registry
from train.config import Config, bundle_config, validate_config
from train.values.records import shorten

# Options that the weights depend on, so they are inherited with the weights.
OF_THE_TASK = ("target", "task_type", "features", "task", "text")


@dataclass(frozen=True)
class CompletedConfig:
    """A run's config with all options filled in, and the bundle that it starts from, if any.

    choice: why its network was chosen, if networks were compared.
    """

    config: Config
    init_bundle: Bundle | None = None
    choice: str | None = None


def inherit_options(config: Config) -> tuple[Config, Bundle]:
    """Return the config completed with options of the `init` bundle, and the bundle.

    In the returned config an alias in `init` is resolved to a version, because an alias may move
    later. Raises UserError if the bundle is missing or damaged, if its model was imported, or if an
    option of OF_THE_TASK is given and differs from the bundle's.
    """
    assert config.init is not None
    try:
        bundle, version = registry.load_bundle(config.init, config.storage.root)
    except CorruptBundle as error:
        raise UserError(f"init is '{config.init}': {error}") from error
    bundle.check_trainable()
    init = bundle.location
    if config.init.startswith(registry.SCHEME):
        init = f"{registry.SCHEME}{registry.model_name(config.init)}/{version}"
    own = validate_config(bundle_config(bundle.manifest.config, config.plugins))
    for name in OF_THE_TASK:
        came, wanted = getattr(config, name), getattr(own, name)
        if name in config.model_fields_set and came and came != wanted:
            raise UserError(
                f"init is '{config.init}', whose option '{name}' is {_shown(wanted)}, not "
                f"{_shown(came)}; omit {name}, or train without init."
            )
    given = {**config.model_dump(mode="json", exclude_unset=True), "init": init}
    inherited = own.model_dump(mode="json", include={*OF_THE_TASK, "net"})
    for name in ("decision_rule", "quantile"):
        if name not in given:
            inherited |= own.model_dump(mode="json", include={name})
    return validate_config(fill_missing(given, inherited)), bundle


def _shown(value: Any) -> str:
    """Return an option's value for a message; a mapping is shown as its column names."""
    return ", ".join(value) if isinstance(value, dict) else shorten(value)


def fill_missing(given: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given`, with missing keys filled in from `found`, recursively."""
    merged = dict(given)
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = fill_missing(merged[key], value)
        else:
            merged.setdefault(key, value)
    return merged
