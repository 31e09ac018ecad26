"""Write and read bundle directories. Shapes: N golden records."""

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
from cluster.errors import UserError
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
    """A bundle is incomplete, altered or in an unknown format. The message names the file."""


class OutdatedBundle(CorruptBundle):
    """A bundle has an older format, which this version cannot read."""


class BundleWriter:
    """Writes the files of a new bundle into a temporary directory.

    `Bundle.create` yields it, and moves the directory to its place when all files are written.
    """

    def __init__(self, aside: Path) -> None:
        self.path = aside

    def file(self, name: str) -> Path:
        """Return the path at which to write the file `name`; its folder exists."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def json(self, name: str, value: Any) -> None:
        """Write a value as the JSON file `name`."""
        self.file(name).write_text(json.dumps(value, indent=1) + "\n")

    def golden(self, inputs: Arrays, outputs: dict[str, Arrays]) -> None:
        """Write the golden records: inputs, and outputs by variant that an engine must reproduce.

        inputs: encoded records by name, [N, …] each. outputs: arrays [N, …] by variant and name.
        """
        arrays = {f"inputs/{name}": array for name, array in inputs.items()}
        for variant, tensors in outputs.items():
            arrays |= {f"outputs/{variant}/{name}": array for name, array in tensors.items()}
        np.savez_compressed(self.file(GOLDEN), allow_pickle=False, **arrays)

    def files(self) -> dict[str, manifests.BundleFile]:
        """Return digest and size of every file written so far, by relative path."""
        paths = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {
            path.relative_to(self.path).as_posix(): manifests.BundleFile(
                sha256=commit.file_digest(path), size_bytes=path.stat().st_size
            )
            for path in paths
        }

    def commit(self, manifest: Manifest, signing_key: str | None = None) -> None:
        """Write the manifest, which completes the bundle, and sign the bundle if there is a key.

        signing_key: see `signature.sign`. Raises UserError if the key cannot be used.
        """
        # The manifest comes last: its presence means that the bundle is complete.
        self.file(manifests.FILENAME).write_text(manifest.model_dump_json(indent=1) + "\n")
        signature.sign(self.path, signing_key)


@dataclass(frozen=True)
class Bundle:
    """A complete bundle on disk, with verified digests.

    location: the path or URL that it was loaded from. path: its local directory.
    """

    location: str
    path: Path
    manifest: Manifest

    @classmethod
    @contextmanager
    def create(cls, location: str) -> Iterator[BundleWriter]:
        """Yield a writer of a bundle, which appears at `location` if the block succeeds.

        location: path or URL.
        """
        with commit.atomic_folder(location, last=manifests.FILENAME, whole=_has_its_files) as aside:
            yield BundleWriter(aside)

    @classmethod
    def load(cls, location: str) -> "Bundle":
        """Read the bundle at a path or URL; verify its files and, if required, its signature.

        Raises CorruptBundle if a file is missing or altered, the signature is not trusted, or the
        bundle names code that is not allowed; UserError if nothing complete is at the URL.
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
                f"'{path}' is not a complete bundle: {manifests.FILENAME} cannot be read. "
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
                raise CorruptBundle(f"'{file}' is missing or not in the bundle's folder. {_REMEDY}")
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
        """Raises CorruptBundle if the bundle names code that the operator has not allowed."""
        named = code_of_task(self.manifest.task) + code_of_config(self.manifest.config)
        # The files of the torch engine name the network and the task to build.
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
        """The fitted task of the model."""
        return Task.from_dict(json.loads((self.path / FEATURES).read_text()))

    @property
    def quantities(self) -> dict[str, Quantity]:
        """The quantities that drift detection monitors, with the counts of held-out records."""
        return read_baseline((self.path / BASELINE).read_bytes())

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the trained weights, or of the ONNX file of an imported model."""
        files = self.manifest.files
        return files[WEIGHTS if WEIGHTS in files else self.manifest.variants["fp32"].file].sha256

    def check_trainable(self) -> None:
        """Raise UserError if another library trained the model."""
        if (imported := self.manifest.imported) is not None:
            raise UserError(
                f"'{self.manifest.name}' was imported from '{imported.source}'; train it with its "
                "own library, and import it again."
            )

    def golden(self, variant: str) -> tuple[Arrays, Arrays]:
        """Return the golden inputs and the variant's expected outputs, arrays [N, …] by name."""
        with np.load(io.BytesIO((self.path / GOLDEN).read_bytes()), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return (_below(arrays, "inputs/"), _below(arrays, f"outputs/{variant}/"))


def _has_its_files(path: Path) -> bool:
    """Return whether a local folder has a manifest and all files that it lists, undamaged."""
    try:
        manifest = Manifest.model_validate_json((path / manifests.FILENAME).read_bytes())
        return all(
            commit.file_digest(path / name) == file.sha256 for name, file in manifest.files.items()
        )
    except (OSError, ValidationError):
        return False


def _check_format(path: Path, content: bytes) -> None:
    """Raises CorruptBundle or OutdatedBundle for a manifest of another format version.

    It runs before validation, which would complain about fields that only the version explains.
    """
    try:
        found = json.loads(content)["format_version"]
    except (ValueError, TypeError, KeyError):
        return  # not a manifest; validation raises the right error
    if found != manifests.FORMAT_VERSION:
        outdated = isinstance(found, int) and found < manifests.FORMAT_VERSION
        raise (OutdatedBundle if outdated else CorruptBundle)(
            f"'{path}' has format {found}; this version reads {manifests.FORMAT_VERSION}. "
            "Train the model again."
        )


def _read_without_digest(path: Path, manifest: Manifest) -> Iterator[Path]:
    """Yield files without a digest that could be read: links, and files where engines look."""
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
