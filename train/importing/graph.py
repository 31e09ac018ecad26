"""An imported ONNX graph, with a task's arrays as its inputs and "logits" as its output.

Shapes: N records, F numbers and C categories per record, K classes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.compose
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from train.importing.onnx_file import model_inputs
from train.tasks import Categories, ClassTarget, Features, Numbers, Target, ValueTarget
from train.values.ragged import FREE

# Smallest probability of which the logarithm is taken.
LEAST = 1e-30
# In front of the names of the model's own tensors.
OWN = "model/"
# Operator that turns probabilities into a map from classes to them.
ZIPMAP = "ZipMap"


class _Graph:
    """Nodes and constants that are added to a graph, under names of their own."""

    def __init__(self, place: str) -> None:
        """place: where the nodes are added, "inputs" or "outputs"."""
        self._prefix = f"halyard/{place}/"
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"{self._prefix}constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, operator: str, *inputs: str, output: str | None = None, **given: Any) -> str:
        name = output or f"{self._prefix}value{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], **given))
        return name


def adapt_graph(
    model: ModelProto,
    features: Features,
    target: Target,
    *,
    layout: str,
    columns: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    output: str,
    kind: str,
) -> ModelProto:
    """Return a model with the arrays of `features` as inputs, and the target's "logits".

    layout: "matrix" if the model takes all columns as one input, "columns" if it takes an input for
    each column, by name, "tokens" if it takes the arrays of the features. columns: in the order of
    the model. texts: for each category, the text of each of its codes. output, kind: the name of
    the output to use, and what it holds: "probabilities" or "scores" of classes, "probability" or
    "score" of the second of two classes, or "values".
    """
    before, after = _Graph("inputs"), _Graph("outputs")
    # A column, or the output, may have the name of an array.
    model = onnx.compose.add_prefix(model, OWN)
    inputs = {value.name.removeprefix(OWN): value.type.tensor_type for value in model_inputs(model)}
    places = {} if layout == "tokens" else _places(features)
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    if layout == "tokens":
        (name,) = inputs
        before.node("Identity", name, output=OWN + name)
    elif layout == "matrix":
        (name,) = inputs
        order = np.array([places[column] for column in columns], np.int64)
        source = Numbers.kind
        if list(order) != list(range(_width(features))):
            source = before.node("Gather", source, before.constant(order), axis=1)
        same = inputs[name].elem_type == TensorProto.DOUBLE
        given = {} if same else {"to": inputs[name].elem_type}
        before.node("Identity" if same else "Cast", source, output=OWN + name, **given)
    else:
        for name, wanted in inputs.items():
            _fill_column(before, name, wanted, places[name], texts.get(name))
    _flatten_biases(graph)
    used = _without_map(graph, OWN + output)
    _add_logits(after, used, kind, target)
    weights = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name in weights]
    del graph.input[:], graph.output[:]
    graph.input.extend(
        [
            helper.make_tensor_value_info(
                spec.name,
                helper.np_dtype_to_tensor_dtype(spec.dtype),
                ["N", *("L" if size == FREE else size for size in spec.shape)],
            )
            for spec in features.inputs
        ]
        + kept
    )
    graph.output.append(
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", target.num_outputs])
    )
    inner = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before.nodes, *inner, *after.nodes])
    graph.initializer.extend([*before.constants, *after.constants])
    opsets = {each.domain or "ai.onnx": each.version for each in model.opset_import}
    opsets.setdefault("ai.onnx", 13)
    adapted = helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("" if domain == "ai.onnx" else domain, version)
            for domain, version in opsets.items()
        ],
        functions=list(model.functions),
    )
    adapted.ir_version = max(model.ir_version, 4)
    return adapted


def _places(features: Features) -> dict[str, int]:
    """Return the place of each column in the array that holds it."""
    places: dict[str, int] = {}
    for encoder in features.encoders:
        assert isinstance(encoder, Numbers | Categories)
        names = encoder.names if isinstance(encoder, Numbers) else encoder.columns
        places |= {name: place for place, name in enumerate(names)}
    return places


def _width(features: Features) -> int:
    return sum(len(each.names) for each in features.encoders if isinstance(each, Numbers))


def _fill_column(
    graph: _Graph, name: str, wanted: Any, place: int, texts: Sequence[str] | None
) -> None:
    """Fill the input of a column: its numbers, or the texts of its codes."""
    index = graph.constant(np.array([place], np.int64))
    shape = [-1, 1] if len(wanted.shape.dim) == 2 else [-1]
    form = graph.constant(np.array(shape, np.int64))
    if texts is not None:
        codes = graph.node("Gather", Categories.kind, index, axis=1)
        table = graph.constant(np.array(texts, object))
        values = graph.node("Gather", table, codes)
    else:
        number = graph.node("Gather", Numbers.kind, index, axis=1)
        values = graph.node("Cast", number, to=wanted.elem_type)
    graph.node("Reshape", values, form, output=OWN + name)


def _flatten_biases(graph: onnx.GraphProto) -> None:
    """Turn biases [1, K] of matrix products into [K], the only form that is quantized."""
    products = {node.output[0] for node in graph.node if node.op_type == "MatMul"}
    biases = set()
    for node in graph.node:
        if node.op_type == "Add" and products & set(node.input):
            biases |= set(node.input) - products
        elif node.op_type == "Gemm":
            biases |= set(node.input[2:])
    users = Counter(name for node in graph.node for name in node.input)
    for tensor in graph.initializer:
        row = len(tensor.dims) == 2 and tensor.dims[0] == 1
        if row and tensor.name in biases and users[tensor.name] == 1:
            del tensor.dims[0]


def _without_map(graph: onnx.GraphProto, output: str) -> str:
    """Return the tensor behind an output; a map from classes to probabilities is left out."""
    for node in graph.node:
        if output in node.output and node.op_type == ZIPMAP:
            graph.node.remove(node)
            return str(node.input[0])
    return output


def _add_logits(graph: _Graph, output: str, kind: str, target: Target) -> None:
    """Turn an output into logits, float32 [N, K]."""
    values = graph.node("Cast", output, to=TensorProto.FLOAT)

    def number(value: float) -> str:
        return graph.constant(np.array(value, np.float32))

    if isinstance(target, ValueTarget):
        column = graph.node("Reshape", values, graph.constant(np.array([-1, 1], np.int64)))
        centred = graph.node("Sub", column, number(target.mean))
        graph.node("Div", centred, number(target.scale), output="logits")
        return
    assert isinstance(target, ClassTarget)
    width = graph.constant(np.array([-1, target.num_outputs], np.int64))
    if kind in ("probability", "score"):  # of the second of two classes
        column = graph.node("Reshape", values, graph.constant(np.array([-1, 1], np.int64)))
        first = (
            graph.node("Sub", number(1.0), column)
            if kind == "probability"
            else graph.node("Mul", column, number(0.0))
        )
        values = graph.node("Concat", first, column, axis=1)
    if kind.startswith("probabilit"):
        values = graph.node("Log", graph.node("Max", values, number(LEAST)))
    graph.node("Reshape", values, width, output="logits")
