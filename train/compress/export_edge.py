"""Edge export: one ONNX file that includes preprocessing and labels and needs only onnxruntime.

The file scales numbers, splits dates into periodic features, encodes categories, and computes
probabilities and labels. Texts are tokenized outside the file, with the exported tokenizer.json.

Shapes: N records, K elements of a vector, labels of a set, or classes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, compose, helper, numpy_helper
from tokenizers import Tokenizer

from cluster.errors import UserError
from train.bundle import Bundle
from train.bundle.manifest import Variant
from train.compress.edge_readme import MODEL, TOKENIZER, edge_readme
from train.tasks import Categories, ClassTarget, LabelsTarget, Numbers, Task, Texts
from train.tasks.columns.categorical import FIRST, MISSING, UNSEEN
from train.tasks.columns.lists import LabelSet, Vector
from train.tasks.columns.numeric import DAY_S, FARTHEST, YEAR_S
from train.tasks.columns.scalars import Date
from train.tasks.regression import ValueTarget

README = "README.md"
BATCH = "batch"


def export_edge(bundle: Bundle, variant: str | None, folder: Path) -> dict[str, Any]:
    """Write a variant as an edge file, with a README and any tokenizer, and return a summary.

    variant: None for the bundle's default variant. folder: created if it does not exist.
    Raises UserError if the variant was not accepted or is not an ONNX file, if a column has the
    name of an output, or if the folder cannot be written.
    """
    manifest = bundle.manifest
    name = variant or manifest.default_variant
    found = manifest.variants.get(name)
    accepted = [each for each, entry in manifest.variants.items() if _portable(entry)]
    if found is None or not _portable(found):
        raise UserError(
            f"variant '{name}' cannot be exported; accepted ONNX variants: "
            f"{', '.join(accepted) or 'none'}."
        )
    task = bundle.task
    outputs = {spec.name for spec in task.target.outputs} | {"labels"}
    if taken := sorted(outputs & {spec.name for spec in task.features.fields}):
        raise UserError(
            f"column '{taken[0]}' has the same name as an output of the edge file; rename the "
            "column and train again."
        )
    model = onnx.load(str(bundle.path / found.file))
    embed_processing(model, task)
    onnx.checker.check_model(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(folder / MODEL))
        for encoder in task.features.encoders:
            if isinstance(encoder, Texts):
                tokenizer = Tokenizer.from_str(encoder.tokenizer)
                tokenizer.no_padding()
                tokenizer.no_truncation()
                (folder / TOKENIZER).write_text(tokenizer.to_str())
        names = [value.name for value in model.graph.output]
        (folder / README).write_text(edge_readme(bundle, name, names))
    except OSError as error:
        raise UserError(
            f"'{folder}' cannot be written: {error.strerror}; give another folder."
        ) from error
    size = (folder / MODEL).stat().st_size
    return {"model": manifest.name, "variant": name, "file": str(folder / MODEL), "bytes": size}


def _portable(variant: Variant) -> bool:
    return variant.accepted and variant.file.endswith(".onnx")


def embed_processing(model: onnx.ModelProto, task: Task) -> None:
    """Add a task's preprocessing and postprocessing to the graph of an ONNX model, in place.

    Raises UserError for custom targets, which have no edge form.
    """
    # A column may have the same name as a tensor of the network, so those get a prefix.
    prefixed = compose.add_prefix(
        model, "net.", rename_inputs=False, rename_outputs=False, rename_functions=False
    )
    model.CopyFrom(prefixed)
    before, after = _Graph(), _Graph()
    given = {value.name: value for value in model.graph.input}
    inputs: list[ValueInfoProto] = []
    for encoder in task.features.encoders:
        match encoder:
            case Numbers():
                inputs += _numbers(before, encoder)
            case Categories():
                inputs += _categories(before, encoder)
            case _:
                inputs += [given[spec.name] for spec in encoder.inputs]
    outputs = _answers(after, task)
    graph = model.graph
    nodes = [*before.nodes, *graph.node, *after.nodes]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    graph.initializer.extend([*before.tensors, *after.tensors])
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))


class _Graph:
    """Collects the nodes and constants that are added to a graph."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []

    def constant(self, values: Any, dtype: Any = None) -> str:
        name = f"edge.constant.{id(self)}.{len(self.tensors)}"
        if dtype is str:
            texts = [value.encode() for value in values]
            tensor = helper.make_tensor(name, TensorProto.STRING, [len(texts)], texts)
        else:
            tensor = numpy_helper.from_array(np.asarray(values, dtype), name)
        self.tensors.append(tensor)
        return name

    def node(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"edge.{id(self)}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output


def _column(name: str, kind: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [BATCH])


def _numbers(graph: _Graph, encoder: Numbers) -> Iterator[ValueInfoProto]:
    """Add the encoding of numbers and yield its inputs.

    A column is DOUBLE [N], NaN if missing; a date is in seconds since 1970, UTC. A vector is
    DOUBLE [N, K]. A set is DOUBLE [N, K], 1 for each of its K known labels that is present, else 0.
    """
    one = graph.constant([1], np.int64)
    places: list[str] = []
    first = None
    for each in encoder.columns:
        if isinstance(each, Vector | LabelSet):
            shape = [BATCH, len(each.places)]
            yield helper.make_tensor_value_info(each.column, TensorProto.DOUBLE, shape)
            places.append(each.column)
            continue
        yield _column(each.column, TensorProto.DOUBLE)
        unknown = graph.node("IsInf", each.column)
        missing = graph.constant(np.nan, np.float64)
        values = graph.node("Where", unknown, missing, each.column)
        for sentinel in getattr(each, "missing", None) or ():
            same = graph.node("Equal", values, graph.constant(sentinel, np.float64))
            values = graph.node("Where", same, missing, values)
        places.append(graph.node("Unsqueeze", values, one))
        if not isinstance(each, Date):
            continue
        for period_s in (DAY_S, 7 * DAY_S, YEAR_S):
            turns = graph.node("Div", values, graph.constant(period_s, np.float64))
            angle = graph.node("Mul", turns, graph.constant(2 * np.pi, np.float64))
            parts = graph.node("Sin", angle), graph.node("Cos", angle)
            places += [graph.node("Unsqueeze", part, one) for part in parts]
        if first is not None:
            places.append(graph.node("Unsqueeze", graph.node("Sub", values, first), one))
        first = first or values
    if encoder.raw:
        graph.node("Concat", *places, output=encoder.kind, axis=1)
        return
    raw = graph.node("Concat", *places, axis=1)
    centred = graph.node("Sub", raw, graph.constant(encoder.mean_F, np.float64))
    scaled = graph.node("Div", centred, graph.constant(encoder.scale_F, np.float64))
    ends = (graph.constant(end, np.float64) for end in (-FARTHEST, FARTHEST))
    within = graph.node("Clip", scaled, *ends)
    graph.node("Cast", within, output=encoder.kind, to=TensorProto.FLOAT)


def _categories(graph: _Graph, encoder: Categories) -> Iterator[ValueInfoProto]:
    """Add the encoding of categories and yield its inputs: STRING [N] by column, "" if missing."""
    one = graph.constant([1], np.int64)
    codes = []
    for column, names in zip(encoder.columns, encoder.names_C, strict=True):
        yield _column(column, TensorProto.STRING)
        code = graph.node(
            "LabelEncoder",
            column,
            domain="ai.onnx.ml",
            keys_strings=["", *names],
            values_int64s=[MISSING, *range(FIRST, FIRST + len(names))],
            default_int64=UNSEEN,
        )
        codes.append(graph.node("Unsqueeze", code, one))
    both = graph.node("Concat", *codes, axis=1)
    graph.node("Cast", both, output=encoder.kind, to=TensorProto.INT32)


def _answers(graph: _Graph, task: Task) -> list[ValueInfoProto]:
    """Add the decoding of the logits and return its outputs."""
    target = task.target
    if isinstance(target, ValueTarget):
        first = graph.node("Gather", "logits", graph.constant(0, np.int64), axis=1)
        scaled = graph.node("Mul", first, graph.constant(target.scale, np.float32))
        graph.node("Add", scaled, graph.constant(target.mean, np.float32), output="value")
        return [_column("value", TensorProto.FLOAT)]
    logits = "logits"
    if isinstance(target, ClassTarget | LabelsTarget) and target.temperature != 1:
        logits = graph.node("Div", logits, graph.constant(target.temperature, np.float32))
    if isinstance(target, ClassTarget):
        graph.node("Softmax", logits, output="probabilities", axis=1)
        best = _chosen_class(graph, target)
        graph.node("Gather", graph.constant(target.classes, str), best, output="label")
        first_output = _column("label", TensorProto.STRING)
    elif isinstance(target, LabelsTarget):
        graph.node("Sigmoid", logits, output="probabilities")
        thresholds = graph.constant(target.thresholds or (0.5,), np.float32)
        graph.node("GreaterOrEqual", "probabilities", thresholds, output="labels")
        shape = [BATCH, len(target.classes)]
        first_output = helper.make_tensor_value_info("labels", TensorProto.BOOL, shape)
    else:
        raise UserError(f"edge export does not support targets of type {type(target).__name__}.")
    shape = [BATCH, len(target.classes)]
    return [
        first_output,
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, shape),
    ]


def _chosen_class(graph: _Graph, target: ClassTarget) -> str:
    """Add the choice of a class, as in ClassTarget.choose; return the tensor with its index."""
    if target.thresholds:
        rarer = graph.node(
            "Gather", "probabilities", graph.constant(target.rarest, np.int64), axis=1
        )
        threshold = graph.constant(target.thresholds[0], np.float32)
        is_rarer = graph.node("GreaterOrEqual", rarer, threshold)
        one, other = (
            graph.constant(index, np.int64) for index in (target.rarest, 1 - target.rarest)
        )
        return graph.node("Where", is_rarer, one, other)
    if target.costs:
        costs = graph.constant(target.costs, np.float32)
        expected = graph.node("MatMul", "probabilities", costs)
        return graph.node("ArgMin", expected, axis=1, keepdims=0)
    return graph.node("ArgMax", "probabilities", axis=1, keepdims=0)
