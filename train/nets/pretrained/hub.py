"""Where checkpoints are found: a folder, the cache of the Hugging Face hub, or the hub."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from cluster.errors import UserError, error_line
from train.nets.pretrained.checkpoints import (
    CARD,
    CONFIG,
    POOLING,
    PREPROCESSOR,
    SHARDS,
    TOKENIZER,
    WEIGHTS,
    PretrainedCheckpoint,
)

# Environment variable with the path or name of an encoder to consider for few records.
PRETRAINED = "HALYARD_PRETRAINED"
# Largest weights of an encoder in the cache that is considered without being asked for.
MOST_BYTES = 1 << 30
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_checkpoint(name: str, *, download: bool = True) -> PretrainedCheckpoint:
    """Return the checkpoint at a path, in the cache of the Hugging Face hub, or downloaded from it.

    download: whether the hub may be asked for files that the cache lacks. Raises UserError if there
    is none, or if its files cannot be used.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        checkpoint = PretrainedCheckpoint(name, folder)
    elif folder.exists() or not REPOSITORY.fullmatch(name) or name.startswith("."):
        raise UserError(
            f"net.pretrained is '{name}', which is not a folder; give a folder with {CONFIG}, "
            f"{WEIGHTS} and {TOKENIZER} or {PREPROCESSOR}, or a name on the Hugging Face hub."
        )
    else:
        checkpoint = PretrainedCheckpoint(name, _of_hub(name, download))
    checkpoint.check()
    return checkpoint


def local_checkpoint(kind: str) -> PretrainedCheckpoint | None:
    """Return an encoder for columns of a kind that needs no download; None if there is none.

    It is that of the environment variable HALYARD_PRETRAINED if this is set, and none if it is
    empty. Otherwise it is the smallest encoder of Sentence Transformers in the cache of the Hugging
    Face hub: other encoders there may give vectors that are of no use unless they are trained.
    Raises UserError if HALYARD_PRETRAINED names none.
    """
    if is_configured():
        name = os.environ[PRETRAINED]
        found = [_named(name)] if name else []
    else:
        found = [each for each in _cached() if (each.folder / POOLING).is_file()]
    found = [each for each in found if each.kind == kind]
    return min(
        found, key=lambda each: sum(path.stat().st_size for path in each.weights), default=None
    )


def is_configured() -> bool:
    """Return whether HALYARD_PRETRAINED is set, if only to nothing."""
    return PRETRAINED in os.environ


def _named(name: str) -> PretrainedCheckpoint:
    try:
        return find_checkpoint(name, download=False)
    except UserError as error:
        raise UserError(f"the environment variable {PRETRAINED} is not usable: {error}") from error


def _cached() -> Iterator[PretrainedCheckpoint]:
    """Yield the usable checkpoints in the cache of the hub."""
    if find_spec("transformers") is None:
        return
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return
    for repository in (each for each in repositories if each.repo_type == "model"):
        newest = max(repository.revisions, key=lambda each: each.last_modified, default=None)
        if newest is None:
            continue
        checkpoint = PretrainedCheckpoint(repository.repo_id, newest.snapshot_path)
        with suppress(UserError):
            checkpoint.check()
            if sum(path.stat().st_size for path in checkpoint.weights) <= MOST_BYTES:
                yield checkpoint


def _of_hub(name: str, download: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise UserError(
            f"net.pretrained is '{name}', and the hub needs huggingface_hub; install it with: "
            "pip install 'halyard[text]'."
        ) from error
    wanted = [CONFIG, TOKENIZER, PREPROCESSOR, "model*.safetensors", SHARDS, POOLING, CARD]
    cached = None
    # The library's errors for what is not cached differ by version.
    with suppress(Exception):
        cached = Path(
            huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=True)
        )
        if _is_complete(PretrainedCheckpoint(name, cached)):
            return cached
    offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE")
    problem = "the hub is not used, because HF_HUB_OFFLINE is set"
    if not download:
        problem = "nothing is downloaded for this variable"
    elif not offline:
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        except Exception as error:  # network, unknown name, missing rights
            problem = f"the hub cannot be read: {error_line(error.__cause__ or error)}"
    if cached is not None:
        return cached
    raise UserError(
        f"net.pretrained is '{name}', which is neither a folder nor in the cache "
        f"'{constants.HF_HUB_CACHE}', and {problem}."
    )


def _is_complete(checkpoint: PretrainedCheckpoint) -> bool:
    """Return whether a snapshot has all files; other programs cache those that they need only."""
    try:
        checkpoint.check()
    except UserError:
        return False
    return checkpoint.kind == "image" or (checkpoint.folder / POOLING).is_file()
