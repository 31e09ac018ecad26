"""The bundle that a run begins from: its options, and its task as it was fitted."""

from typing import Any

from cluster import storage
from cluster.errors import UserError
from train.bundle import Bundle, CorruptBundle, registry
from train.config import Config, of_bundle, validate
from train.tasks.records import shown

# What fits a bundle's weights, and is taken over with them.
OF_THE_TASK = ("target", "learn", "features", "task", "text")


def load(config: Config) -> Bundle:
    """Return the bundle that `init` names. Raises UserError if there is none, or not whole."""
    assert config.init is not None
    try:
        return registry.load(config.init, storage.resolve(config.storage.path))[0]
    except CorruptBundle as error:
        raise UserError(f"init is '{config.init}': {error}") from error


def pinned(config: Config) -> str:
    """Return `init` as it names the same bundle later: an alias may move on, a version does not."""
    assert config.init is not None
    location, version = registry.resolve(config.init, storage.resolve(config.storage.path))
    if not config.init.startswith(registry.SCHEME):
        return location
    return f"{registry.SCHEME}{registry.name_of(config.init)}/{version}"


def options(config: Config) -> dict[str, Any]:
    """Return what a run takes over from the bundle it begins from: what its task and net are.

    Raises UserError for an option of the task that is given and is another.
    """
    assert config.init is not None
    own = validate(of_bundle(load(config).manifest.config, config.plugins))
    for name in OF_THE_TASK:
        came, wanted = getattr(config, name), getattr(own, name)
        if name in config.model_fields_set and came and came != wanted:
            raise UserError(
                f"init is '{config.init}', whose option '{name}' is {_shown(wanted)}, not "
                f"{_shown(came)}; leave {name} out, or train without init."
            )
    return own.model_dump(mode="json", include={*OF_THE_TASK, "net"})


def _shown(value: Any) -> str:
    """The names of columns, and what else an option may be."""
    return ", ".join(value) if isinstance(value, dict) else shown(value)
