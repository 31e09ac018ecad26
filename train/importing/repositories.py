"""Models of other servers: a model's folder of Triton, and archives of TorchServe."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from cluster.errors import UserError
from train.importing.onnx_file import model_inputs, read_model
from train.values.records import DATATYPES

CONFIG, MODEL = "config.pbtxt", "model.onnx"
MANIFEST = "MAR-INF/MANIFEST.json"
TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[A-Za-z_][\w.]*|-?[\d.]+(?:[eE][+-]?\d+)?|[{}\[\]:,;]')
SPACE = re.compile(r"\s+|#[^\n]*")
# Parts of a configuration without an equivalent.
UNSUPPORTED = ("sequence_batching", "ensemble_scheduling", "model_transaction_policy")
TEXT_DATATYPE = "TYPE_STRING"


def triton_model(folder: Path, source: str) -> tuple[Path, list[str]]:
    """Return the ONNX file of a folder in Triton's model repository, and options for the server.

    The highest version is taken, or the highest that version_policy names. Raises UserError if the
    configuration cannot be read, has no equivalent, or does not fit the file.
    """
    try:
        config = parse_text_format((folder / CONFIG).read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"'{source}': {CONFIG} cannot be read: {error}.") from error
    kind = _text(config, "backend") or _text(config, "platform").partition("_")[0]
    if kind not in ("", "onnxruntime"):
        raise UserError(f"'{source}' needs Triton's {kind}; only models in ONNX can be imported.")
    if found := [name for name in UNSUPPORTED if name in config]:
        raise UserError(f"'{source}' has {found[0]} in {CONFIG}, which has no equivalent.")
    name = _text(config, "default_model_filename") or MODEL
    versions = [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
    policy = _first(_first(config, "version_policy"), "specific")
    wanted = [each for each in versions if each in policy.get("versions", versions)]
    if not wanted:
        raise UserError(f"'{source}' has no folder of a version, such as 1/{name}.")
    path = folder / str(max(wanted)) / name
    if not path.is_file():
        raise UserError(f"'{source}' has no file '{max(wanted)}/{name}'.")
    _check_tensors(config, path, source)
    return path, _server_options(config)


def archived_model(archive: Path, folder: Path, source: str) -> Path:
    """Extract the ONNX file of an archive of TorchServe into `folder`, and return it.

    Raises UserError if it is no such archive, or its model is not in ONNX.
    """
    with zipfile.ZipFile(archive) as files:
        try:
            manifest = json.loads(files.read(MANIFEST))
            name = str(manifest["model"]["serializedFile"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"'{source}': {MANIFEST} names no serialized file.") from error
        if not name.endswith(".onnx"):
            raise UserError(
                f"'{source}' holds '{name}', which needs the code of its model; export it with "
                "torch.onnx.export, and import the ONNX file."
            )
        if name not in files.namelist() or PurePosixPath(name).name != name:
            raise UserError(f"'{source}' does not hold '{name}', which {MANIFEST} names.")
        target = folder / MODEL
        target.write_bytes(files.read(name))
    return target


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive of TorchServe."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as files:
        return MANIFEST in files.namelist()


def _check_tensors(config: dict[str, list[Any]], path: Path, source: str) -> None:
    """Compare the tensors of a configuration with those of the file, if it lists any."""
    model = read_model(path)
    batched = int((config.get("max_batch_size") or [0])[0]) > 0
    for kind, values in (("input", model_inputs(model)), ("output", list(model.graph.output))):
        known = {value.name: value.type.tensor_type for value in values}
        for tensor in config.get(kind, []):
            name = _text(tensor, "name")
            if name not in known:
                raise UserError(
                    f"'{source}': {CONFIG} has the {kind} '{name}', and the file has "
                    f"{', '.join(known)}."
                )
            sizes = [int(size) for size in tensor.get("dims", [])]
            wanted = [-1, *sizes] if batched else sizes
            shape = [
                each.dim_value if each.HasField("dim_value") else -1
                for each in known[name].shape.dim
            ]
            datatype = _text(tensor, "data_type")
            if datatype != _triton_type(known[name].elem_type) or wanted != shape:
                raise UserError(
                    f"'{source}': {CONFIG} has the {kind} '{name}' as {datatype} {wanted}, and the "
                    f"file has {_triton_type(known[name].elem_type)} {shape}."
                )


def _triton_type(element: int) -> str:
    if element == onnx.TensorProto.STRING:
        return TEXT_DATATYPE
    return "TYPE_" + DATATYPES[onnx.helper.tensor_dtype_to_np_dtype(element)]


def _server_options(config: dict[str, list[Any]]) -> list[str]:
    """Return options of `serve run serve.app` for those of a configuration."""
    options = []
    batching = _first(config, "dynamic_batching")
    if preferred := batching.get("preferred_batch_size"):
        options.append(f"batching.max_rows={max(int(each) for each in preferred)}")
    if delay := batching.get("max_queue_delay_microseconds"):
        options.append(f"batching.wait_ms={float(delay[0]) / 1000:g}")
    if most := config.get("max_batch_size"):
        options += [f"limits.max_rows={int(most[0])}"] if int(most[0]) > 0 else []
    counts = [int(each.get("count", [1])[0]) for each in config.get("instance_group", [])]
    if sum(counts) > 1:
        options.append(f"replicas={sum(counts)}")
    return options


def _text(message: dict[str, list[Any]], key: str) -> str:
    return str((message.get(key) or [""])[0])


def _first(message: dict[str, list[Any]], key: str) -> dict[str, list[Any]]:
    found = (message.get(key) or [{}])[0]
    return found if isinstance(found, dict) else {}


def parse_text_format(text: str) -> dict[str, list[Any]]:
    """Return a message in protobuf's text format: all values of each field, in order.

    A value is a text, a number, a boolean or another message. Raises ValueError if the text is
    malformed.
    """
    tokens = _tokens(text)
    return _message(tokens, "")


def _tokens(text: str) -> Iterator[str]:
    """Yield the tokens of a text, and last an empty one."""
    place = 0
    while place < len(text):
        if space := SPACE.match(text, place):
            place = space.end()
            continue
        found = TOKEN.match(text, place)
        if found is None:
            raise ValueError(f"line {text.count(chr(10), 0, place) + 1} is malformed")
        place = found.end()
        if found[0] not in (":", ",", ";"):  # optional, or between values
            yield found[0]
    yield ""


def _message(tokens: Iterator[str], end: str) -> dict[str, list[Any]]:
    message: dict[str, list[Any]] = {}
    for name in tokens:
        if name == end:
            return message
        if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            raise ValueError(f"'{name}' is not the name of a field" if name else "it ends early")
        values = message.setdefault(name, [])
        token = next(tokens)
        if token != "[":
            values.append(_value(tokens, token))
            continue
        while (token := next(tokens)) != "]":
            values.append(_value(tokens, token))
    raise ValueError("it ends early")


def _value(tokens: Iterator[str], token: str) -> Any:
    if token == "{":
        return _message(tokens, "}")
    if token.startswith('"'):
        return json.loads(token)
    if token in ("true", "false"):
        return token == "true"
    if re.fullmatch(r"[A-Za-z_][\w.]*", token):  # a constant, such as TYPE_FP32
        return token
    try:
        return int(token)
    except ValueError:
        return float(token)
