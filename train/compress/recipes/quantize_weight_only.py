"""Int8 weights without calibration: the variants `int8_weights` and `int8_dynamic`.

Weights become int8 with one scale for each output channel, or for each row of an embedding.
`int8_weights` converts them back to float once, when the file is loaded: the file has a quarter of
the size, and the speed is that of fp32. `int8_dynamic` computes matrix products in int8, with a
scale for each row of the activations that is computed at inference. ONNX Runtime's own dynamic
quantization uses one scale for a whole batch, so predictions would depend on the batch.

Both operands of such a product are unsigned bytes with zero point 128. x86 processors without VNNI
multiply unsigned by signed bytes and add pairs of products in 16 bits, where sums above 32,767
saturate; with full-range bytes nearly every result would be wrong. For two unsigned operands, ONNX
Runtime first widens to 16 bits on these processors, and on processors with VNNI it runs the same
kernel as for signed weights. The results are therefore the same integers on every processor.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# Smaller weights stay in float: they save little, and small first layers are the most sensitive.
LEAST_VALUES = 1024
PRODUCTS = ("MatMul", "Gemm")
# Zero point of unsigned bytes.
ZERO = 128


def int8_weights(source: Path, target: Path) -> None:
    """Write a version of the ONNX file `source` that stores its weights in int8."""
    _rewrite(source, target, dynamic=False)


def int8_dynamic(source: Path, target: Path) -> None:
    """Write a version of the ONNX file `source` that also multiplies matrices in int8."""
    _rewrite(source, target, dynamic=True)


def _rewrite(source: Path, target: Path, *, dynamic: bool) -> None:
    model = onnx.load(str(source))
    graph = model.graph
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) >= 2
    }
    users: dict[str, list[tuple[int, NodeProto]]] = defaultdict(list)
    for node in graph.node:
        for place, name in enumerate(node.input):
            users[name].append((place, node))

    written = _Rewriter()
    for node in graph.node:
        at = _weight_place(node)
        name = node.input[at] if at is not None else ""
        if (
            name not in weights
            or weights[name].size < LEAST_VALUES
            # A weight with several uses stays in float.
            or len(users[name]) > 1
        ):
            written.nodes.append(node)
        elif node.op_type == "Gather":
            written.gather(node, weights[name])
        elif dynamic and node.op_type in PRODUCTS and weights[name].ndim == 2:
            written.product(node, weights[name])
        else:
            written.widened(node, weights[name])
    kept = [tensor for tensor in graph.initializer if tensor.name not in written.replaced]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(written.nodes)
    graph.initializer.extend([*kept, *written.tensors])
    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def _weight_place(node: NodeProto) -> int | None:
    """Return the index of the input that is the node's weight, or None."""
    attributes = _attributes(node)
    if node.op_type == "Gather" and attributes.get("axis", 0) == 0:
        return 0
    plain = attributes.get("alpha", 1.0) == 1 == attributes.get("beta", 1.0)
    if node.op_type == "Gemm" and (not plain or attributes.get("transA", 0)):
        return None
    return 1 if node.op_type in ("Conv", *PRODUCTS) else None


def _attributes(node: NodeProto) -> dict[str, object]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _quantized(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int8 values and the scales along `axis`, with the same number of dimensions."""
    others = tuple(each for each in range(weight.ndim) if each != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = np.maximum(largest / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


class _Rewriter:
    """Collects the nodes and tensors of the new graph. Shapes: V rows, D inputs, K outputs."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.replaced: set[str] = set()
        self._added = 0

    def widened(self, node: NodeProto, weight: np.ndarray) -> None:
        """Keep the node and convert its int8 weight to float, which is done once at load time."""
        axis = 0 if node.op_type == "Conv" or _attributes(node).get("transB", 0) else -1
        values, scale = self._weight(node.input[1], weight, axis % weight.ndim)
        wide = self._node("Cast", values, to=TensorProto.FLOAT)
        node.input[1] = self._node("Mul", wide, scale)
        self.nodes.append(node)

    def gather(self, node: NodeProto, table_VD: np.ndarray) -> None:
        """Look up rows of an int8 table [V, D] and convert only these to float."""
        values, scale = self._weight(node.input[0], table_VD, 0)
        rows = self._node("Gather", values, node.input[1], axis=0)
        wide = self._node("Cast", rows, to=TensorProto.FLOAT)
        scales = self._node("Gather", scale, node.input[1], axis=0)
        self._node("Mul", wide, scales, output=node.output[0])

    def product(self, node: NodeProto, weight: np.ndarray) -> None:
        """Add x·W in int8: x [..., D] has a scale for each row, W [D, K] one for each column."""
        weight_DK = weight.T if _attributes(node).get("transB", 0) else weight
        x, name = node.input[0], node.input[1]
        values, scale = self._weight(name, np.ascontiguousarray(weight_DK), 1, zero=ZERO)
        axes = self._tensor(f"{name}.axes", np.array([-1]))
        largest = self._node("ReduceMax", self._node("Abs", x), axes, keepdims=1)
        steps = self._tensor(f"{name}.steps", np.float32(1 / 127))
        least = self._tensor(f"{name}.least", np.finfo(np.float32).tiny)
        row_scale = self._node("Max", self._node("Mul", largest, steps), least)
        rounded = self._node("Round", self._node("Div", x, row_scale))
        middle = self._tensor(f"{name}.middle", np.float32(ZERO))
        shifted = self._node("Add", rounded, middle)
        activation = self._node("Cast", shifted, to=TensorProto.UINT8)
        zero = self._tensor(f"{name}.zero", np.uint8(ZERO))
        summed = self._node("MatMulInteger", activation, values, zero, zero)
        wide = self._node("Cast", summed, to=TensorProto.FLOAT)
        scaled = self._node("Mul", self._node("Mul", wide, row_scale), scale)
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else None
        if bias:
            self._node("Add", scaled, bias, output=node.output[0])
        else:
            self._node("Identity", scaled, output=node.output[0])

    def _weight(self, name: str, weight: np.ndarray, axis: int, zero: int = 0) -> tuple[str, str]:
        """Add a weight in int8, or in uint8 if a zero point is given, and its scales."""
        values, scale = _quantized(weight, axis)
        if zero:
            values = (values.astype(np.int16) + zero).astype(np.uint8)
        self.replaced.add(name)
        return self._tensor(f"{name}.int8", values), self._tensor(f"{name}.scale", scale)

    def _tensor(self, name: str, values: np.ndarray | np.generic) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def _node(self, kind: str, *inputs: str, output: str | None = None, **attributes: int) -> str:
        self._added += 1
        output = output or f"int8.{self._added}"
        node = helper.make_node(kind, list(inputs), [output], f"int8.{self._added}", **attributes)
        self.nodes.append(node)
        return output
