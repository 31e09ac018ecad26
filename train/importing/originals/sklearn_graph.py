"""The ONNX graph of a model of scikit-learn, in the precision in which it computes itself.

It runs in the isolated process. Shapes: N records, F features, K classes.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx.compose
from onnx import TensorProto

from train.importing.isolated import Unsuitable
from train.importing.originals.boosted_trees import register_boosted
from train.importing.originals.converters import register_converters
from train.importing.originals.sklearn_trees import ML_OPSET, has_trees, tree_graph

# Encoders with a fitted list of categories for each column.
ENCODERS = ("OneHotEncoder", "OrdinalEncoder", "TargetEncoder")
# Precisions of the steps before a model and of the model, in the order in which they are tried.
PRECISIONS = (
    *(("double", "float"), ("double", "double")),
    *(("float", "float"), ("float", "double")),
)
# Difference from the original, of probabilities or in standard deviations of the predicted values,
# below which no other precision is tried.
EXACT = 1e-5


def best_graph(
    model: Any,
    names: list[str],
    categories: set[str],
    inputs: Any,
    outputs: dict[str, np.ndarray],
) -> tuple[str, onnx.ModelProto]:
    """Return the layout of the inputs, and the graph whose predictions are nearest the original's.

    Steps before the model and trees compute in double precision, as in scikit-learn; other models
    in single precision if that is as good. inputs: a data frame or float64 [N, F]. outputs: those
    of the original. Raises Unsuitable if the model cannot be converted.
    """
    try:
        import skl2onnx  # noqa: F401 - named in the error below
    except ImportError as error:
        raise Unsuitable(
            "a model of scikit-learn needs skl2onnx; install it with: pip install 'halyard[import]'"
        ) from error
    register_converters()
    register_boosted()
    prepared = _flat(copy.deepcopy(model))
    parts = list(inner_estimators(prepared))
    _replace_missing(parts)
    transformers = any(type(part).__name__ == "ColumnTransformer" for part in parts)
    by_column = not isinstance(inputs, np.ndarray) and (bool(categories) or transformers)
    layout = "columns" if by_column else "matrix"
    found: list[tuple[float, onnx.ModelProto]] = []
    reasons = []
    for before, last in PRECISIONS:
        if has_trees(_last(prepared)) and last != "double":
            continue
        try:
            graph = _graph(prepared, names, categories, by_column, before, last)
            difference = _difference(graph, inputs, categories, outputs["values"])
        except Exception as error:  # converters and ONNX Runtime raise many classes
            reasons.append(" ".join(str(error).split())[:300] or type(error).__name__)
            continue
        if difference <= EXACT:
            return layout, graph
        found.append((difference, graph))
    if not found:
        raise Unsuitable(f"it cannot be converted to ONNX: {reasons[0]}")
    return layout, min(found, key=lambda each: each[0])[1]


def _graph(
    model: Any, names: list[str], categories: set[str], by_column: bool, before: str, last: str
) -> onnx.ModelProto:
    """Return a graph with one output. before, last: precision of the steps and of the model."""
    import skl2onnx
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType, StringTensorType

    kinds = {"double": DoubleTensorType, "float": FloatTensorType}
    opset = {"": skl2onnx.__max_supported_opset__, "ai.onnx.ml": ML_OPSET}

    def inputs(kind: str) -> list[tuple[str, Any]]:
        number = kinds[kind]
        if not by_column:
            return [("features", number([None, len(names)]))]
        return [
            (name, (StringTensorType if name in categories else number)([None, 1]))
            for name in names
        ]

    final = _last(model)
    first = None
    if hasattr(model, "steps") and len(model.steps) > 1:
        first = skl2onnx.to_onnx(model[:-1], initial_types=inputs(before), target_opset=opset)
        width = final.n_features_in_
        model_inputs = [("prepared", kinds[last]([None, width]))]
    else:
        model_inputs = inputs(last)
    if has_trees(final):
        second = tree_graph(final, model_inputs[0][0])
    else:
        second = _model_graph(final, model_inputs, opset)
    graph = second
    if first is not None:
        graph = _joined(first, second, kinds[last]([None, 1])._get_element_onnx_type())
    if by_column:
        _restore_names(graph, names)
    return graph


def _restore_names(graph: onnx.ModelProto, names: list[str]) -> None:
    """Name the inputs as the columns; skl2onnx replaces characters that are no part of a word.

    Raises NotImplementedError if the names of two columns become equal.
    """
    plain = {re.sub(r"[^\w+]", "_", name): name for name in names}
    given = {value.name for value in graph.graph.input}
    if len(plain) < len(names) or not given <= plain.keys():
        raise NotImplementedError("columns whose names differ in special characters only")
    for value in graph.graph.input:
        value.name = plain[value.name]
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            if name in given:
                node.input[place] = plain[name]


def _model_graph(model: Any, inputs: Any, opset: dict[str, int]) -> onnx.ModelProto:
    """Return the graph of a model without its labels, with probabilities or scores as an array."""
    import skl2onnx

    array: dict[str, bool] = {"zipmap": False}
    raw = {} if hasattr(model, "predict_proba") else {"raw_scores": True}
    for options in (array | raw, array, raw):
        try:
            graph = skl2onnx.to_onnx(
                model, initial_types=inputs, options={id(model): options}, target_opset=opset
            )
        except NameError:  # the model does not have one of these options
            continue
        break
    else:
        graph = skl2onnx.to_onnx(model, initial_types=inputs, target_opset=opset)
    del graph.graph.output[:-1]
    return graph


def _joined(first: onnx.ModelProto, second: onnx.ModelProto, element: int) -> onnx.ModelProto:
    """Return a graph in which the output of one model is the input of another."""
    outputs = first.graph.output
    if len(outputs) != 1:
        raise NotImplementedError("steps with several outputs")
    cast = onnx.helper.make_node("Cast", [outputs[0].name], ["halyard/cast"], to=element)
    first.graph.node.append(cast)
    outputs[0].CopyFrom(onnx.helper.make_tensor_value_info("halyard/cast", element, ["N", None]))
    second = onnx.compose.add_prefix(second, "model/")
    versions = {each.domain: each.version for each in (*first.opset_import, *second.opset_import)}
    versions["ai.onnx.ml"] = ML_OPSET
    for each in (first, second):
        each.ir_version = second.ir_version
        del each.opset_import[:]
        each.opset_import.extend(
            onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()
        )
    (received,) = second.graph.input
    return onnx.compose.merge_models(first, second, [("halyard/cast", received.name)])


def _difference(
    graph: onnx.ModelProto, inputs: Any, categories: set[str], values: np.ndarray
) -> float:
    """Return the largest difference of a graph's outputs from those of the original."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    feed = {}
    for wanted in session.get_inputs():
        precision = np.float64 if "double" in wanted.type else np.float32
        if isinstance(inputs, np.ndarray):
            feed[wanted.name] = inputs.astype(precision)
        elif wanted.name not in inputs.columns:
            feed[wanted.name] = inputs.to_numpy(precision)
        elif wanted.name in categories:
            column = inputs[wanted.name]
            feed[wanted.name] = column.where(column.notna(), "").to_numpy(object)[:, None]
        else:
            feed[wanted.name] = inputs[wanted.name].to_numpy(precision)[:, None]
    (found,) = session.run(None, feed)
    scale = 1.0 if values.ndim == 2 else float(np.std(values)) or 1.0
    if found.ndim == 2 and found.shape[1] == 2 and values.ndim == 1:
        found = found[:, 1]
        _take_second(graph)
    return float(np.abs(found.reshape(values.shape) - values).max()) / scale


def _take_second(graph: onnx.ModelProto) -> None:
    """Replace scores of both of two classes by that of the second, as scikit-learn gives it."""
    (output,) = graph.graph.output
    second = onnx.numpy_helper.from_array(np.array([1], np.int64), "halyard/second")
    graph.graph.initializer.append(second)
    graph.graph.node.append(
        onnx.helper.make_node("Gather", [output.name, second.name], ["halyard/score"], axis=1)
    )
    output.CopyFrom(
        onnx.helper.make_tensor_value_info("halyard/score", TensorProto.FLOAT, ["N", 1])
    )


def inner_estimators(model: Any) -> Iterator[Any]:
    """Yield an estimator and all estimators that it contains, each once."""
    return _parts(model, set())


def _parts(part: Any, seen: set[int]) -> Iterator[Any]:
    """Yield an estimator and all estimators that it contains."""
    from sklearn.base import BaseEstimator

    if id(part) in seen:
        return
    seen.add(id(part))
    inner: Any = ()
    if isinstance(part, BaseEstimator):
        yield part
        inner = list(vars(part).values())
    elif isinstance(part, dict):
        inner = part.values()
    elif isinstance(part, list | tuple):
        inner = part
    for each in inner:
        yield from _parts(each, seen)


def _flat(model: Any) -> Any:
    """Return a pipeline without a pipeline as its last step."""
    while hasattr(model, "steps") and hasattr(_last(model), "steps"):
        steps = [*model.steps[:-1], *_last(model).steps]
        model = type(model)([(f"step{place}", step) for place, (_, step) in enumerate(steps)])
    return model


def _last(model: Any) -> Any:
    return model.steps[-1][1] if hasattr(model, "steps") else model


def _replace_missing(parts: list[Any]) -> None:
    """Let the parts treat "" as they treat a missing text, which ONNX does not have."""
    for part in parts:
        if type(part).__name__ == "VotingClassifier":
            part.flatten_transform = False  # which predictions do not depend on
        if getattr(part, "encode", None) == "onehot":  # ONNX has no sparse arrays
            part.encode = "onehot-dense"
        for name in ("_probA", "_probB"):  # lists in an SVC without probabilities
            if isinstance(getattr(part, name, None), list):
                setattr(part, name, np.array(getattr(part, name)))
        if type(part).__name__ == "SimpleImputer" and hasattr(part, "statistics_"):
            texts = any(isinstance(value, str) for value in part.statistics_)
            if texts and not isinstance(part.missing_values, str):
                part.missing_values = ""
        if type(part).__name__ in ENCODERS and hasattr(part, "categories_"):
            part.categories_ = [
                np.array(["" if _is_missing(value) else value for value in values], object)
                if values.dtype == object
                else values
                for values in part.categories_
            ]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)
