"""Plugins: which modules may be imported because a config or a bundle names a class in them.

A bundle is data and may come from anywhere, so a class name in a bundle alone does not cause an
import. The operator allows modules with the option `plugins` or by naming a class in a training
config. A command calls `allow_modules` once in each of its processes.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Matches package.module:Name.
PATH = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")

_allowed: set[str] = set()
_data: set[Path] = set()


class NotAllowed(ValueError):
    """Code in a module that the operator has not allowed, or in a data folder."""


def allow_modules(modules: Iterable[str], *, storage: str | None = None) -> None:
    """Allow this process to import classes of these modules and of their submodules.

    storage: local folder of the models; code below it is never imported.
    """
    _allowed.update(modules)
    if storage is not None:
        exclude_folder(Path(storage))


def allowed_modules() -> list[str]:
    """Return the modules that this process may import, for `allow_modules` in another process."""
    return sorted(_allowed)


def exclude_folder(folder: Path) -> None:
    """Forbid imports from a data folder and everything below it, in this process."""
    _data.add(folder.resolve())


def is_allowed(path: str) -> bool:
    """Return whether the module of package.module:Name, or a parent of it, is allowed."""
    return _is_below(path.partition(":")[0], _allowed)


def import_object(path: str) -> Any:
    """Import and return the object that package.module:Name names.

    Raises NotAllowed, before anything is imported, if the module is not allowed or is in a data
    folder; ValueError if the path is malformed or cannot be imported.
    """
    match = PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"'{path[:100]}' is not a valid path; expected package.module:Name")
    module, name = match.groups()
    if not is_allowed(path):
        raise NotAllowed(f"{refusal([path])}.")
    _check_place(module)
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"'{path}' cannot be imported ({error}); expected package.module:Name, importable from "
            "the current directory."
        ) from error
    # A module also contains the names that it imports, which are not allowed with it.
    if not _is_below(getattr(found, "__module__", None) or "", _allowed):
        raise NotAllowed(f"'{path}' is defined elsewhere; give the module that defines it")
    return found


def code_of_task(state: Any) -> list[str]:
    """Return each package.module:Name in the saved state of a task."""
    parts = [state, _get(state, "target"), *_items(_get(state, "features"))]
    return _paths([*(_get(part, "kind") for part in parts), _get(state, "target", "loss")])


def code_of_config(values: Any) -> list[str]:
    """Return each package.module:Name in the options of a training run."""
    columns = _get(values, "features")
    kinds = list(columns.values()) if isinstance(columns, Mapping) else []
    nets = [_get(values, "net"), _get(values, "compress", "distill", "net")]
    return _paths(
        [
            _get(values, "task"),
            # A column and a net may each be a string instead of a mapping.
            *(kind if isinstance(kind, str) else _get(kind, "kind") for kind in kinds),
            *(net if isinstance(net, str) else _get(net, "class_path") for net in nets),
        ]
    )


def _get(state: Any, *keys: str) -> Any:
    """Return the value at nested keys, or None if a key is missing."""
    for key in keys:
        state = state.get(key) if isinstance(state, Mapping) else None
    return state


def _items(state: Any) -> list[Any]:
    return list(state) if isinstance(state, list | tuple) else []


def _paths(found: Iterable[Any]) -> list[str]:
    return sorted({each for each in found if isinstance(each, str) and ":" in each})


def refusal(paths: Iterable[str]) -> str:
    """Return a message that names code which is not allowed, and the option that allows it."""
    names = sorted(set(paths))
    modules = modules_of(names)
    return (
        f"not allowed to import {', '.join(names)[:300]}. If you trust this code, add "
        f"plugins={modules} to serve run, or --plugins {modules} to another command"
    )


def modules_of(paths: Iterable[str]) -> str:
    """Return the modules of package.module:Name paths, as the option `plugins` takes them."""
    return ",".join(sorted({path.partition(":")[0] for path in paths}))


def check_allowed(paths: Iterable[str], what: str) -> None:
    """Check that all paths are allowed. Raises NotAllowed, with all that are not.

    what: where the paths come from, such as a bundle; the message begins with it.
    """
    if wrong := [path for path in paths if not is_allowed(path)]:
        raise NotAllowed(f"{what}: {refusal(wrong)}.")


def _check_place(module: str) -> None:
    """Raises NotAllowed for a module in a data folder, before it is imported."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        # Finding a module imports its parent packages, which earlier iterations have checked.
        spec = _spec(name)
        if spec is None:
            return  # the module does not exist; importing it raises the right error
        places = [*(spec.submodule_search_locations or []), spec.origin or ""]
        for place in map(Path, filter(None, places)):
            if any(place.resolve().is_relative_to(folder) for folder in _data):
                raise NotAllowed(f"'{module}' is not imported: '{place}' is in a data folder")


def _spec(name: str) -> Any:
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    try:
        return find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return None


def _is_below(module: str, allowed: Iterable[str]) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in allowed)
