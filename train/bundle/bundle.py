"""Writing and reading the bundle directory."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from cluster import commit
from train.bundle import manifest as manifests
from train.bundle import signature
from train.bundle.feature_statistics import Quantity, read_baseline
from train.bundle.manifest import Manifest
from train.tasks import Arrays, Task, plugins
from train.tasks.plugins import NotAllowed, code_of_config, code_of_task

GOLDEN = "golden.npz"
FEATURES = "features.json"
BASELINE = "baseline.json"
WEIGHTS = "weights.safetensors"


class CorruptBundle(Exception):
    """A bundle that is incomplete, altered or of an unknown format. The message names the file."""


class OutdatedBundle(CorruptBundle):
    """A bundle of an older format, which this version cannot read."""


class BundleWriter:
    """Collects a bundle's files in a directory aside; `commit` makes it appear, whole.

    Used by `Bundle.create`.
    """

    def __init__(self, aside: Path) -> None:
        self.path = aside

    def file(self, name: str) -> Path:
        """Return the path at which to write the file `name`, its folder made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def json(self, name: str, value: Any) -> None:
        self.file(name).write_text(json.dumps(value, indent=1) + "\n")

    def golden(self, inputs: Arrays, outputs: dict[str, Arrays]) -> None:
        """Keep inputs and, for each variant, the outputs that a loaded bundle must give again."""
        arrays = {f"inputs/{name}": array for name, array in inputs.items()}
        for variant, tensors in outputs.items():
            arrays |= {f"outputs/{variant}/{name}": array for name, array in tensors.items()}
        np.savez_compressed(self.file(GOLDEN), allow_pickle=False, **arrays)

    def files(self) -> dict[str, manifests.BundleFile]:
        """Digest and size of every file written so far, by relative name."""
        paths = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {
            path.relative_to(self.path).as_posix(): manifests.BundleFile(
                sha256=commit.file_digest(path), size_bytes=path.stat().st_size
            )
            for path in paths
        }

    def commit(self, manifest: Manifest, signing_key: str | None = None) -> None:
        """Write the manifest, which ends the bundle, and sign it where there is a key.

        signing_key: see `signature.sign`, whose errors it raises.
        """
        # Last: readers take its presence as "complete".
        self.file(manifests.FILENAME).write_text(manifest.model_dump_json(indent=1) + "\n")
        signature.sign(self.path, signing_key)


@dataclass(frozen=True)
class Bundle:
    """A complete bundle on disk whose digests have been checked."""

    location: str
    path: Path
    manifest: Manifest

    @classmethod
    @contextmanager
    def create(cls, location: str) -> Iterator[BundleWriter]:
        """Write a bundle that appears at `location`, a path or URL, when the block ends well."""
        with commit.atomic_folder(location, last=manifests.FILENAME, whole=_has_its_files) as aside:
            yield BundleWriter(aside)

    @classmethod
    def load(cls, location: str) -> "Bundle":
        """Read the bundle at `location`, a path or URL; check its signature, where one is required,
        and every file against its digest.

        Raises CorruptBundle, naming the file, or the code that is named and not allowed.
        """
        path = commit.fetch(location, last=manifests.FILENAME)
        plugins.exclude_folder(path)
        try:
            signature.check(path)
        except signature.NotTrusted as error:
            raise CorruptBundle(f"{error}.") from error
        try:
            content = (path / manifests.FILENAME).read_bytes()
            _check_format(path, content)
            manifest = Manifest.model_validate_json(content)
        except OSError as error:
            raise CorruptBundle(
                f"'{path}' has no readable {manifests.FILENAME}; it is no complete bundle. "
                "Train the model again or name another version."
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CorruptBundle(
                f"{path / manifests.FILENAME}: {where or 'content'}: {first['msg']}. "
                "Train the model again or name another version."
            ) from error
        needed = {FEATURES, GOLDEN, *(variant.file for variant in manifest.variants.values())}
        if unlisted := sorted(needed - manifest.files.keys()):
            raise CorruptBundle(
                f"'{path / unlisted[0]}' has no digest in {manifests.FILENAME}. {_REMEDY}"
            )
        for name, expected in manifest.files.items():
            file = path / name
            if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
                raise CorruptBundle(f"'{file}' is missing; the bundle is damaged. {_REMEDY}")
            if (
                file.stat().st_size != expected.size_bytes
                or commit.file_digest(file) != expected.sha256
            ):
                raise CorruptBundle(
                    f"'{file}' differs from its digest in {manifests.FILENAME}. {_REMEDY}"
                )
        for file in _read_without_digest(path, manifest):
            raise CorruptBundle(
                f"'{file}' is not listed in {manifests.FILENAME}; delete it. {_REMEDY}"
            )
        bundle = cls(location, path, manifest)
        bundle._check_code()
        return bundle

    def _check_code(self) -> None:
        """Raises CorruptBundle where the bundle names code that the operator has not allowed."""
        named = code_of_task(self.manifest.task) + code_of_config(self.manifest.config)
        # The torch engine's files say what net to build, and for what task.
        nets = [each.file for each in self.manifest.variants.values()]
        for name in [FEATURES, *(file for file in nets if file.endswith(".json"))]:
            try:
                state = json.loads((self.path / name).read_bytes())
            except ValueError as error:
                raise CorruptBundle(f"'{self.path / name}' is not JSON. {_REMEDY}") from error
            named += code_of_task(state) + code_of_config(state)
            named += code_of_task(state.get("task")) if isinstance(state, dict) else []
        try:
            plugins.check_allowed(named, f"'{self.path}'")
        except NotAllowed as error:
            raise CorruptBundle(str(error)) from error

    @property
    def task(self) -> Task:
        return Task.from_dict(json.loads((self.path / FEATURES).read_text()))

    @property
    def quantities(self) -> dict[str, Quantity]:
        """What is watched of its traffic, with the counts of held-out records."""
        return read_baseline((self.path / BASELINE).read_bytes())

    def golden(self, variant: str) -> tuple[Arrays, Arrays]:
        """Return the golden inputs and the variant's expected outputs."""
        with np.load(io.BytesIO((self.path / GOLDEN).read_bytes()), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return (_below(arrays, "inputs/"), _below(arrays, f"outputs/{variant}/"))


def _has_its_files(path: Path) -> bool:
    """Whether a local folder has a manifest and the files that it lists, undamaged."""
    try:
        manifest = Manifest.model_validate_json((path / manifests.FILENAME).read_bytes())
        return all(
            commit.file_digest(path / name) == file.sha256 for name, file in manifest.files.items()
        )
    except (OSError, ValidationError):
        return False


def _check_format(path: Path, content: bytes) -> None:
    """Raises CorruptBundle for a manifest of another format, whose fields are others too."""
    try:
        found = json.loads(content)["format_version"]
    except (ValueError, TypeError, KeyError):
        return  # no manifest; validation says what is wrong
    if found != manifests.FORMAT_VERSION:
        outdated = isinstance(found, int) and found < manifests.FORMAT_VERSION
        raise (OutdatedBundle if outdated else CorruptBundle)(
            f"'{path}' has format {found}; this version reads {manifests.FORMAT_VERSION}. "
            "Train the model again."
        )


def _read_without_digest(path: Path, manifest: Manifest) -> Iterator[Path]:
    """Files that have no digest and could be read: links, and files where engines look for some."""
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        looked_for = name in (BASELINE, WEIGHTS) or name.startswith("variants/")
        unlisted = name not in manifest.files and name != manifests.FILENAME
        if file.is_symlink() or (looked_for and unlisted and not file.is_dir()):
            yield file


_REMEDY = "Copy the bundle again, or name another version."


def _below(arrays: Arrays, prefix: str) -> Arrays:
    return {
        key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
    }
