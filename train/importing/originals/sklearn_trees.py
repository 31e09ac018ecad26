"""ONNX graphs of the trees of scikit-learn, with thresholds and sums in double precision.

In single precision, two classes that are equally probable in a forest would differ by rounding, and
a number could be on the other side of a threshold. They run in the isolated process. Shapes: N
records, F features, K outputs, T nodes of a tree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# Version of the operators of trees from which on they have values in double precision.
ML_OPSET = 3
FORESTS = ("RandomForest", "ExtraTrees", "DecisionTree", "ExtraTree")


@dataclass(frozen=True)
class Tree:
    """Nodes of a tree: a record goes left if its feature is at most the threshold.

    feature_T: -1 for leaves. values_TK: what a leaf adds to each output.
    """

    feature_T: np.ndarray
    threshold_T: np.ndarray
    left_T: np.ndarray
    right_T: np.ndarray
    missing_left_T: np.ndarray
    values_TK: np.ndarray


def has_trees(model: Any) -> bool:
    """Return whether `tree_graph` knows the model."""
    forest = type(model).__name__.removesuffix("Classifier").removesuffix("Regressor") in FORESTS
    own = type(model).__module__.startswith("sklearn.")
    return own and (forest or hasattr(model, "_predictors"))


def tree_graph(model: Any, name: str) -> onnx.ModelProto:
    """Return the ONNX graph of a forest, a tree, or gradient-boosted trees on histograms.

    name: of its input, double [N, F]. Its output is "variable", float32 [N, 1], or "probabilities",
    float32 [N, K]. Raises NotImplementedError for splits on categories and several targets.
    """
    if hasattr(model, "_predictors"):
        trees = list(_histogram_trees(model))
        width = len(model._predictors[0])
        base_K = np.broadcast_to(np.asarray(model._baseline_prediction).ravel(), width)
        link, output = _link(model, width)
        rounded: list[NodeProto] = []
        features = name
    else:
        trees = list(_forest(model))
        width = trees[0].values_TK.shape[1]
        base_K = np.zeros(width)
        output = "probabilities" if hasattr(model, "classes_") else "variable"
        link = [helper.make_node("Identity", ["raw"], [output])]
        # As scikit-learn does.
        rounded = [
            helper.make_node("Cast", [name], ["single"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["single"], ["rounded"], to=TensorProto.DOUBLE),
        ]
        features = "rounded"
    graph = helper.make_graph(
        [*rounded, _ensemble(trees, features, base_K), *link],
        "trees",
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["N", model.n_features_in_])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", None])],
        [numpy_helper.from_array(np.array(1.0, np.float32), "one")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _ensemble(trees: list[Tree], features: str, base_K: np.ndarray) -> NodeProto:
    """Return the operator that sums the values of the leaves that a record reaches."""
    counts = [len(tree.feature_T) for tree in trees]
    leaf_T = np.concatenate([tree.feature_T < 0 for tree in trees])
    tree_T = np.repeat(np.arange(len(trees)), counts)
    node_T = np.concatenate([np.arange(count) for count in counts])
    values_TK = np.concatenate([tree.values_TK for tree in trees])
    # Values of 0 add nothing.
    place, output = np.nonzero(leaf_T[:, None] & (values_TK != 0))

    def joined(part: str) -> np.ndarray:
        return np.concatenate([getattr(tree, part) for tree in trees])

    def doubles(values: np.ndarray) -> TensorProto:
        return numpy_helper.from_array(np.asarray(values, np.float64))

    whole = {
        "nodes_treeids": tree_T,
        "nodes_nodeids": node_T,
        "nodes_featureids": np.where(leaf_T, 0, joined("feature_T")),
        "nodes_truenodeids": np.where(leaf_T, 0, joined("left_T")),
        "nodes_falsenodeids": np.where(leaf_T, 0, joined("right_T")),
        "nodes_missing_value_tracks_true": joined("missing_left_T"),
        "target_treeids": tree_T[place],
        "target_nodeids": node_T[place],
        "target_ids": output,
    }
    return helper.make_node(
        "TreeEnsembleRegressor",
        [features],
        ["raw"],
        domain="ai.onnx.ml",
        n_targets=len(base_K),
        nodes_modes=np.where(leaf_T, "LEAF", "BRANCH_LEQ").tolist(),
        base_values_as_tensor=doubles(base_K),
        nodes_values_as_tensor=doubles(np.where(leaf_T, 0, joined("threshold_T"))),
        target_weights_as_tensor=doubles(values_TK[place, output]),
        **{key: values.astype(int).tolist() for key, values in whole.items()},
    )


def _histogram_trees(model: Any) -> Iterator[Tree]:
    width = len(model._predictors[0])
    for group in model._predictors:
        for k, predictor in enumerate(group):
            nodes = predictor.nodes
            if nodes["is_categorical"].any():
                raise NotImplementedError("splits on categories")
            leaf_T = nodes["is_leaf"].astype(bool)
            values_TK = np.zeros((len(nodes), width))
            values_TK[:, k] = nodes["value"]
            yield Tree(
                np.where(leaf_T, -1, nodes["feature_idx"]),
                nodes["num_threshold"],
                nodes["left"],
                nodes["right"],
                nodes["missing_go_to_left"],
                values_TK,
            )


def _forest(model: Any) -> Iterator[Tree]:
    estimators = getattr(model, "estimators_", [model])
    for estimator in estimators:
        tree = estimator.tree_
        if tree.n_outputs != 1:
            raise NotImplementedError("several targets")
        values_TK = tree.value[:, 0, :]
        if hasattr(model, "classes_"):
            values_TK = values_TK / values_TK.sum(axis=1, keepdims=True)
        yield Tree(
            tree.feature,
            tree.threshold,
            tree.children_left,
            tree.children_right,
            getattr(tree, "missing_go_to_left", np.zeros(tree.node_count)),
            values_TK / len(estimators),
        )


def _link(model: Any, width: int) -> tuple[list[NodeProto], str]:
    """Return the nodes that turn raw values into predictions, and the name of their output."""
    if hasattr(model, "classes_"):
        if width > 1:
            return [
                helper.make_node("Softmax", ["raw"], ["probabilities"], axis=1)
            ], "probabilities"
        return [
            helper.make_node("Sigmoid", ["raw"], ["second"]),
            helper.make_node("Sub", ["one", "second"], ["first"]),
            helper.make_node("Concat", ["first", "second"], ["probabilities"], axis=1),
        ], "probabilities"
    exponential = model.loss in ("poisson", "gamma")
    return [
        helper.make_node("Exp" if exponential else "Identity", ["raw"], ["variable"])
    ], "variable"
