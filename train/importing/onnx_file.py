"""Models in ONNX files. Shapes: N records, F features, K classes.

`read_model` checks a file and brings it together; the rest runs in the isolated process.
"""

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

from cluster.errors import UserError
from train.importing.isolated import Unsuitable
from train.importing.sample import Sample

# Domains whose operators ONNX Runtime has.
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
TEXT = TensorProto.STRING
NUMBERS = (
    *(TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16),
    *(TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL),
)


def read_model(path: Path) -> ModelProto:
    """Read an ONNX file with the weights that it keeps in other files of its folder.

    Raises UserError if it is not an ONNX file, names files outside its folder, has no inputs, or
    has operators that need another library.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises several classes
        raise UserError(f"'{path}' is not an ONNX file.") from error
    if not model.graph.node:
        raise UserError(f"'{path}' is not an ONNX file with a model.")
    _check_weights(model, path)
    onnx.load_external_data_for_model(model, str(path.parent))
    for tensor in _tensors(model):
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
    known = {*DOMAINS, *(function.domain for function in model.functions)}
    if foreign := [node for node in _nodes(model.graph) if node.domain not in known]:
        raise UserError(
            f"'{path}' has the operator {foreign[0].op_type} of the domain '{foreign[0].domain}', "
            "which needs a library of its own; export the model with standard operators."
        )
    if not model_inputs(model):
        raise UserError(f"'{path}' has no inputs.")
    return model


def model_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Return the inputs of a model; files of old versions list its weights among them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def adapt_file(
    path: Path, sample: Sample, target: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Copy an ONNX file to `target` after it has run on the sample.

    Returns what is known of it, and its own outputs for the sample, [N, …] by name. Raises
    Unsuitable if the columns of the sample do not fit its inputs.
    """
    import onnxruntime

    model = onnx.load(path)
    inputs = model_inputs(model)
    names, layout = _columns(inputs, sample)
    onnxruntime.set_default_logger_severity(4)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs_of = [each.name for each in session.get_outputs()]

    def run(given: Sample) -> list[Any]:
        found: list[Any] = session.run(None, _feed(inputs, layout, names, given))
        return found

    def run_one(one: Sample) -> np.ndarray:
        floats = [each for each in run(one) if isinstance(each, np.ndarray)]
        return np.concatenate([np.ravel(e) for e in floats if e.dtype.kind == "f"] or [np.zeros(1)])

    results = dict(zip(outputs_of, run(sample), strict=True))
    texts = [value.name for value in inputs if value.type.tensor_type.elem_type == TEXT]
    categories = texts if layout == "columns" else []
    target.write_bytes(path.read_bytes())
    facts: dict[str, Any] = {
        "library": f"ONNX Runtime {onnxruntime.__version__}",
        "model": model.producer_name or "ONNX",
        "layout": layout,
        "columns": names,
        "categories": categories,
        "known": {name: _known_texts(model) for name in categories},
        "limits": sample.find_limits(names, categories, run_one),
    }
    chosen, outputs = choose_output(results, len(next(iter(sample.texts.values()))))
    return facts | chosen, outputs


def _feed(
    inputs: list[ValueInfoProto], layout: str, names: list[str], sample: Sample
) -> dict[str, np.ndarray]:
    """Return the columns of a sample as the inputs of a model."""

    def numbers(columns: list[str], value: ValueInfoProto) -> np.ndarray:
        found = sample.matrix(columns)
        dtype = _dtype(value)
        if dtype.kind not in "f" and np.isnan(found).any():
            raise Unsuitable(f"its input '{value.name}' takes integers, and some are missing")
        return found.astype(dtype)

    if layout == "matrix":
        return {inputs[0].name: numbers(names, inputs[0])}
    feed = {}
    for value in inputs:
        if value.type.tensor_type.elem_type == TEXT:
            texts_N = sample.texts[value.name]
            column = np.where(texts_N == None, "", texts_N)  # noqa: E711
        else:
            column = numbers([value.name], value)
        feed[value.name] = column.reshape((-1, 1) if len(_shape(value)) == 2 else (-1,))
    return feed


def _check_weights(model: ModelProto, path: Path) -> None:
    """Check that all files with weights are in the model's folder."""
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
        file = path.parent / where
        if PurePosixPath(where).is_absolute() or not file.resolve().is_relative_to(
            path.parent.resolve()
        ):
            raise UserError(
                f"'{path}' keeps weights in '{where}', outside its folder; copy the file beside it "
                "and export the model again."
            )
        if not file.is_file():
            raise UserError(f"'{path}' keeps weights in '{where}', which is missing.")


def _tensors(model: ModelProto) -> list[TensorProto]:
    found = list(model.graph.initializer)
    for node in _nodes(model.graph):
        found += [each.t for each in node.attribute if each.HasField("t")]
    return found


def _nodes(graph: GraphProto) -> list[Any]:
    """Return all nodes of a graph and of the graphs in their attributes."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for each in inner:
                found += _nodes(each)
    return found


def _columns(inputs: list[ValueInfoProto], sample: Sample) -> tuple[list[str], str]:
    """Return the columns that the inputs take and their layout: "matrix" or "columns"."""
    for value in inputs:
        kind = value.type.tensor_type.elem_type
        if kind not in (TEXT, *NUMBERS):
            raise Unsuitable(f"its input '{value.name}' is neither of numbers nor of texts")
        if len(shape := _shape(value)) not in (1, 2):
            raise Unsuitable(
                f"its input '{value.name}' has {len(shape)} dimensions, and a row of the sample "
                "has one; import it without --data"
            )
        if shape and isinstance(shape[0], int):
            raise Unsuitable(
                f"its input '{value.name}' has a fixed batch of {shape[0]}; export the model with "
                "a free first dimension"
            )
    widths = [_shape(value)[1] if len(_shape(value)) == 2 else 1 for value in inputs]
    if len(inputs) == 1 and widths[0] != 1:
        count = widths[0] if isinstance(widths[0], int) else len(sample.texts)
        return sample.choose(None, count), "matrix"
    if wide := [v.name for v, width in zip(inputs, widths, strict=True) if width not in (1, None)]:
        raise Unsuitable(f"it has several inputs, of which '{wide[0]}' takes several columns")
    return sample.choose([value.name for value in inputs], len(inputs)), "columns"


def _shape(value: ValueInfoProto) -> list[int | None]:
    """Return the dimensions of an input, None where they are free."""
    sizes = value.type.tensor_type.shape.dim
    return [each.dim_value if each.HasField("dim_value") else None for each in sizes]


def _dtype(value: ValueInfoProto) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _known_texts(model: ModelProto) -> list[str]:
    """Return the texts in the attributes and constants of a model, such as names of categories."""
    found: dict[str, None] = {}
    for node in _nodes(model.graph):
        for attribute in node.attribute:
            if attribute.name.startswith("classlabels"):
                continue
            for text in attribute.strings:
                found.setdefault(text.decode(errors="replace"))
    for tensor in _tensors(model):
        if tensor.data_type == TEXT:
            for text in tensor.string_data:
                found.setdefault(text.decode(errors="replace"))
    return [text for text in found if text]


def choose_output(
    results: dict[str, Any], count: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Choose the output to import: probabilities or scores if there are any, else values.

    results: outputs by name, [N, …] each, or a list of maps from classes to probabilities. count:
    N. Returns what is known of the output, and its values. Raises Unsuitable if there is none.
    """
    maps = {name: each for name, each in results.items() if isinstance(each, list)}
    arrays = {name: each for name, each in results.items() if isinstance(each, np.ndarray)}
    labels = {name: each for name, each in arrays.items() if each.dtype.kind in "OUi"}
    values = {name: each for name, each in arrays.items() if each.dtype.kind == "f"}
    fits = {name: each for name, each in values.items() if each.ndim <= 2 and len(each) == count}
    if maps:  # a probability by class for each record
        name, rows = next(iter(maps.items()))
        classes = list(rows[0])
        found = np.array([[row[key] for key in classes] for row in rows], np.float64)
        return _classes(name, found, labels, classes)
    if not fits:
        raise Unsuitable("none of its outputs has one row of numbers for each record")
    # Probabilities come after labels; several heads cannot be told apart.
    name = next((each for each in fits if "prob" in each.lower()), list(fits)[-1])
    return _classes(name, fits[name].astype(np.float64), labels, None)


def _classes(
    name: str, values: np.ndarray, labels: dict[str, np.ndarray], classes: list[Any] | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    outputs = {"values": values}
    facts: dict[str, Any] = {"output": name, "classes": classes, "task_type": None}
    facts["outputs"] = "probabilities" if are_probabilities(values) else "values"
    if labels:
        label_N = next(iter(labels.values())).reshape(-1)
        facts["task_type"] = "classification"
        outputs["names"] = label_N.astype(str)
    wide = values.ndim == 2 and values.shape[1] > 1
    if facts["outputs"] != "probabilities" and (labels or wide):
        facts |= {"task_type": "classification", "outputs": "scores"}
    return facts, outputs


def are_probabilities(values: np.ndarray) -> bool:
    """Return whether values are probabilities: [N] of one of two classes, or [N, K] of all."""
    if not (values >= 0).all() or not (values <= 1 + 1e-5).all():
        return False
    wide = values.ndim == 2 and values.shape[1] > 1
    return not wide or bool(np.allclose(values.sum(axis=1), 1, atol=1e-4))
