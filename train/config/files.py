"""Config files: read a YAML mapping, merge options, and name a model after its data."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster import storage
from cluster.errors import UserError


def default_model_name(url: str) -> str:
    """Return a model name derived from the name of the training file."""
    stem = url.rstrip("/*").rpartition("/")[2].partition(".")[0].lower()
    return re.sub("[^a-z0-9_-]+", "-", stem).strip("-_")[:63] or "model"


def load_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML mapping from a path or URL.

    Raises UserError if the file cannot be read or is not a YAML mapping.
    """
    fs, inner = storage.filesystem(str(path))
    try:
        with fs.open(inner, "r") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise UserError(
            f"config file '{path}' cannot be read: {error.strerror or error}; give a YAML file, "
            f"such as train/configs/digits.yaml."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"config file '{path}' is not valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"config file '{path}' contains no options; expected 'name: VALUE' lines.")
    return values


def merge_options(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `over`; sections that both contain are merged recursively."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = merge_options(inner, value)
        merged[key] = value
    return merged
