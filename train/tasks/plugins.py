"""Code of the user's own: which modules may be imported because a config or a bundle names them.

A bundle is data, and may come from anywhere, so that naming a class in it imports nothing. The
operator names the modules that may be imported: by the option `plugins`, or by naming a class in a
training config. A command says so once, by `allow`, in each of its processes.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# package.module:Name
PATH = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")

_allowed: set[str] = set()
_data: set[Path] = set()


class NotAllowed(ValueError):
    """Code that the operator has not named, or that lies among data."""


def allow_modules(modules: Iterable[str], *, storage: str | None = None) -> None:
    """Let this process import classes of some modules, and of those below them.

    storage: the local folder where models are kept; nothing below it is ever imported.
    """
    _allowed.update(modules)
    if storage is not None:
        exclude_folder(Path(storage))


def allowed_modules() -> list[str]:
    """The modules that this process may import; for `allow` in another."""
    return sorted(_allowed)


def exclude_folder(folder: Path) -> None:
    """Never import anything below a folder that holds data."""
    _data.add(folder.resolve())


def is_allowed(path: str) -> bool:
    """Whether the operator has named the module of package.module:Name, or one above it."""
    return _is_below(path.partition(":")[0], _allowed)


def import_object(path: str) -> Any:
    """Return what package.module:Name names.

    Raises NotAllowed, and nothing has been imported, where the operator has not named the module;
    ValueError if there is no such thing.
    """
    match = PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"'{path[:100]}' names no code; expected package.module:Name")
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
    # A module has more in it than what it is for: what it imports itself.
    if not _is_below(getattr(found, "__module__", None) or "", _allowed):
        raise NotAllowed(f"'{path}' is defined elsewhere; name it by the module that defines it")
    return found


def code_of_task(state: Any) -> list[str]:
    """Each package.module:Name in the state of a task."""
    parts = [state, _get(state, "target"), *_items(_get(state, "features"))]
    return _paths([*(_get(part, "kind") for part in parts), _get(state, "target", "loss")])


def code_of_config(values: Any) -> list[str]:
    """Each package.module:Name in the options of a training run."""
    columns = _get(values, "features")
    kinds = list(columns.values()) if isinstance(columns, Mapping) else []
    nets = [_get(values, "net"), _get(values, "compress", "distill", "net")]
    return _paths(
        [
            _get(values, "task"),
            # A column and a net may be a string alone.
            *(kind if isinstance(kind, str) else _get(kind, "kind") for kind in kinds),
            *(net if isinstance(net, str) else _get(net, "class_path") for net in nets),
        ]
    )


def _get(state: Any, *keys: str) -> Any:
    """A part of nested dicts; None where there is none."""
    for key in keys:
        state = state.get(key) if isinstance(state, Mapping) else None
    return state


def _items(state: Any) -> list[Any]:
    return list(state) if isinstance(state, list | tuple) else []


def _paths(found: Iterable[Any]) -> list[str]:
    return sorted({each for each in found if isinstance(each, str) and ":" in each})


def refusal(paths: Iterable[str]) -> str:
    """Say that code is not allowed, and what to do."""
    names = sorted(set(paths))
    modules = ",".join(sorted({name.partition(":")[0] for name in names}))
    return (
        f"code that is not allowed is named: {', '.join(names)[:300]}. "
        f"If you trust it, add plugins={modules[:300]}"
    )


def check_allowed(paths: Iterable[str], what: str) -> None:
    """Raises NotAllowed, naming all of them, where code that is named is not allowed.

    what: names it, such as a bundle.
    """
    if wrong := [path for path in paths if not is_allowed(path)]:
        raise NotAllowed(f"{what}: {refusal(wrong)}.")


def _check_place(module: str) -> None:
    """Raises NotAllowed for a module that lies among data, before it is imported."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        # Imports the packages above it, which have been checked.
        spec = _spec(name)
        if spec is None:
            return  # there is no such module, which importing it says
        places = [*(spec.submodule_search_locations or []), spec.origin or ""]
        for place in map(Path, filter(None, places)):
            if any(place.resolve().is_relative_to(folder) for folder in _data):
                raise NotAllowed(f"'{module}' lies at '{place}', among data, and is not imported")


def _spec(name: str) -> Any:
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    try:
        return find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return None


def _is_below(module: str, allowed: Iterable[str]) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in allowed)
