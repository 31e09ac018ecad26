"""Formats of model files, recognized by their content, and the models of MLflow."""

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import commit, storage
from cluster.errors import UserError, error_line
from train.bundle.registry import SCHEME
from train.importing import repositories
from train.nets.pretrained.checkpoints import CONFIG, PretrainedCheckpoint

# Names of the formats for messages.
FORMATS = {
    "onnx": "ONNX",
    "pickle": "pickle",
    "skops": "skops",
    "xgboost": "XGBoost",
    "lightgbm": "LightGBM",
    "transformers": "transformers",
    "torch": "PyTorch",
}
PICKLES = (".pkl", ".pickle", ".joblib")
# File in the archives of skops, the format of scikit-learn's models without code.
SKOPS = "schema.json"
MLMODEL = "MLmodel"
RUNS = "runs:/"
# End of the names of classes of transformers.
HEAD = "ForSequenceClassification"
# Flavours of MLflow by preference, with the key of the file, relative to the model's folder.
FLAVORS = {"onnx": "data", "xgboost": "data", "lightgbm": "data", "sklearn": "pickled_model"}


@dataclass(frozen=True)
class ModelFile:
    """A file that holds a model: where it came from, its format and its digest.

    options: those of the server that correspond to the model's configuration in another server.
    """

    source: str
    path: Path
    format: str
    sha256: str
    options: tuple[str, ...] = ()


def find_model_file(source: str, root: str, scratch: Path, *, allow_pickle: bool) -> ModelFile:
    """Return the file of a model, and recognize its format.

    source: a file, an archive of TorchServe, a folder that MLflow wrote or of a model in Triton's
    repository, or a URI of a model in MLflow's registry or of a run. root: the storage path, whose
    registry such URIs refer to. scratch: a folder to extract an archive into.
    Raises UserError if there is no model of a known format, or it is a pickle and these are not
    allowed.
    """
    path = _download(source, root) if source.startswith((SCHEME, RUNS)) else Path(source)
    options: list[str] = []
    if (path / repositories.CONFIG).is_file():
        path, options = repositories.triton_model(path, source)
    elif _is_text_classifier(path):
        checkpoint = PretrainedCheckpoint(source, path)
        checkpoint.check()
        return ModelFile(source, path, "transformers", checkpoint.digest)
    elif path.is_dir():
        path = _flavor_file(path, source)
    if not path.is_file():
        raise UserError(f"'{source}' does not exist; give the file of a model.")
    if repositories.is_archive(path):
        path = repositories.archived_model(path, scratch, source)
    found = _format(path)
    if found is None:
        raise UserError(
            f"'{source}' is of no known format; expected {', '.join(FORMATS.values())}."
        )
    if found == "pickle" and not allow_pickle:
        raise UserError(
            f"'{source}' is a pickle, and reading it runs the code in it; if you trust its source, "
            "give --allow-pickle."
        )
    return ModelFile(source, path, found, commit.file_digest(path), tuple(options))


def _is_text_classifier(path: Path) -> bool:
    """Return whether a folder holds a text classifier of transformers."""
    try:
        facts = json.loads((path / CONFIG).read_text())
        return any(str(name).endswith(HEAD) for name in facts["architectures"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _format(path: Path) -> str | None:
    """Return the format of a file by its first bytes, and by its suffix where these do not tell."""
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"tree\n"):
        return "lightgbm"
    if start.startswith((b"{L", b"{")) and (b"learner" in start or b"version" in start[:64]):
        return "xgboost"
    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            return "skops" if SKOPS in archive.namelist() else None
    if start.startswith(b"\x80") and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if path.suffix in PICKLES or start.startswith((b"ccopy_reg", b"cjoblib", b"csklearn")):
        return "pickle"
    if path.suffix == ".safetensors":
        return "torch"
    # An ONNX file is a protobuf message that begins with the version of its format.
    return "onnx" if path.suffix == ".onnx" or start[:1] == b"\x08" else None


def _download(uri: str, root: str) -> Path:
    import mlflow

    mlflow.set_tracking_uri(storage.tracking_uri(root))
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except Exception as error:  # MLflow's stores raise several classes
        raise UserError(f"'{uri}' cannot be read: {error_line(error)}.") from error


def _flavor_file(folder: Path, source: str) -> Path:
    """Return the file of a model that MLflow wrote."""
    if not (folder / MLMODEL).is_file():
        models = sorted(each.parent.name for each in folder.glob(f"*/{repositories.CONFIG}"))
        if models:
            raise UserError(
                f"'{source}' is a repository with the models {', '.join(models)}; give the folder "
                f"of one, such as '{source}/{models[0]}'."
            )
        raise UserError(
            f"'{source}' is a folder without {MLMODEL} or {repositories.CONFIG}; give the file of "
            "a model, or a folder of MLflow or Triton."
        )
    try:
        facts: dict[str, Any] = yaml.safe_load((folder / MLMODEL).read_text())
        flavors = facts["flavors"]
        name = next(each for each in FLAVORS if each in flavors)
        file = folder / str(flavors[name][FLAVORS[name]])
    except (KeyError, TypeError, StopIteration, yaml.YAMLError) as error:
        raise UserError(
            f"'{source}' has none of the flavours {', '.join(FLAVORS)}; save the model with one of "
            "them."
        ) from error
    if not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder)):
        raise UserError(f"'{source}' names a file outside its folder, '{file}'.")
    if file.is_dir():  # ONNX with weights in other files
        file = next(iter(sorted(file.glob("*.onnx"))), file)
    return file
