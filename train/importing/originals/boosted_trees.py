"""Models of XGBoost and LightGBM. Shapes: N records, F features, K classes.

It runs in the isolated process.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from train.importing.isolated import Unsuitable
from train.importing.sample import Sample

INSTALL = "install it with: pip install 'halyard[import]'"
Adapted = tuple[dict[str, Any], dict[str, np.ndarray]]


def adapt_xgboost_file(path: Path, sample: Sample, target: Path) -> Adapted:
    """Read a model in XGBoost's own format, JSON or UBJSON; see `adapt_booster`."""
    xgboost = _library("xgboost", "XGBoost")
    return _xgboost(xgboost.Booster(model_file=str(path)), None, sample, target)


def adapt_lightgbm_file(path: Path, sample: Sample, target: Path) -> Adapted:
    """Read a model in LightGBM's text format; see `adapt_booster`."""
    lightgbm = _library("lightgbm", "LightGBM")
    return _lightgbm(lightgbm.Booster(model_file=str(path)), None, sample, target)


def adapt_boosted(model: Any, sample: Sample, target: Path) -> Adapted | None:
    """Write the ONNX graph of a model of XGBoost or LightGBM to `target`; None for other models.

    Returns what is known of the model, and its own outputs for the sample. Raises Unsuitable if it
    cannot be imported.
    """
    package = type(model).__module__.partition(".")[0]
    classes = getattr(model, "classes_", None)
    if package == "xgboost":
        booster = model.get_booster() if hasattr(model, "get_booster") else model
        return _xgboost(booster, classes, sample, target)
    if package == "lightgbm":
        booster = model.booster_ if hasattr(model, "booster_") else model
        return _lightgbm(booster, classes, sample, target)
    return None


def register_boosted() -> None:
    """Let skl2onnx convert pipelines that end in a model of XGBoost or LightGBM."""
    if importlib.util.find_spec("onnxmltools") is None:
        return
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )

    options = {"zipmap": [True, False, "columns"], "nocl": [True, False]}
    for package, name, module, function in (
        ("xgboost", "XGB", "xgboost.operator_converters.XGBoost", "convert_xgboost"),
        ("lightgbm", "LGBM", "lightgbm.operator_converters.LightGbm", "convert_lightgbm"),
    ):
        if importlib.util.find_spec(package) is None:
            continue
        library = importlib.import_module(package)
        converter = getattr(importlib.import_module(f"onnxmltools.convert.{module}"), function)
        for kind, shapes, given in (
            ("Classifier", calculate_linear_classifier_output_shapes, options),
            ("Regressor", calculate_linear_regressor_output_shapes, None),
        ):
            own = getattr(library, name + kind)
            update_registered_converter(
                own, f"Halyard{name}{kind}", shapes, converter, options=given
            )


def _library(package: str, name: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise Unsuitable(f"it needs {name}; {INSTALL}")
    return importlib.import_module(package)


def _xgboost(booster: Any, classes: Any, sample: Sample, target: Path) -> Adapted:
    xgboost = _library("xgboost", "XGBoost")
    config = json.loads(booster.save_config())["learner"]
    objective = config["objective"]["name"]
    if "c" in (booster.feature_types or []):
        raise Unsuitable(
            "it splits on categories of its own, which ONNX cannot; train it on encoded columns"
        )
    if objective in ("binary:hinge", "binary:logitraw"):
        raise Unsuitable(f"its objective is {objective}; only binary:logistic has probabilities")
    names = sample.choose(booster.feature_names, booster.num_features())
    features_NF = sample.matrix(names)
    if objective == "multi:softmax":  # predicts classes instead of probabilities
        booster.set_param({"objective": "multi:softprob"})
    if booster.attr("best_iteration") is not None:  # early stopping; its own classifier does so too
        booster = booster[: booster.best_iteration + 1]
    data = xgboost.DMatrix(features_NF, feature_names=booster.feature_names)
    values = np.asarray(booster.predict(data), np.float64)
    is_binary, is_multi = objective == "binary:logistic", objective.startswith("multi:")
    booster.feature_names = None  # the converter reads f0, f1, … only
    graph = _converted("convert_xgboost", booster, len(names))
    facts = {"library": f"XGBoost {xgboost.__version__}", "model": f"Booster, {objective}"}
    return _finished(facts, graph, names, values, classes, is_binary or is_multi, target)


def _lightgbm(booster: Any, classes: Any, sample: Sample, target: Path) -> Adapted:
    lightgbm = _library("lightgbm", "LightGBM")
    objective = str(booster.dump_model(num_iteration=1).get("objective", "")).split(" ")[0]
    if booster.pandas_categorical:
        raise Unsuitable(
            "it splits on categories of its own, which ONNX cannot; train it on encoded columns"
        )
    named = booster.feature_name()
    count = booster.num_feature()
    unnamed = named == [f"Column_{place}" for place in range(count)]
    columns = {name.replace(" ", "_"): name for name in sample.texts}  # LightGBM has no spaces
    wanted = None if unnamed else [columns.get(name, name) for name in named]
    names = sample.choose(wanted, count)
    values = np.asarray(booster.predict(sample.matrix(names)), np.float64)
    is_class = objective in ("binary", "multiclass", "multiclassova")
    graph = _converted("convert_lightgbm", booster, len(names), zipmap=False)
    facts = {"library": f"LightGBM {lightgbm.__version__}", "model": f"Booster, {objective}"}
    return _finished(facts, graph, names, values, classes, is_class, target)


def _converted(function: str, booster: Any, num_features: int, **options: Any) -> Any:
    onnxmltools = _library("onnxmltools", "onnxmltools")
    from onnxmltools.convert.common.data_types import FloatTensorType

    inputs = [("features", FloatTensorType([None, num_features]))]
    try:
        return getattr(onnxmltools, function)(booster, initial_types=inputs, **options)
    except Exception as error:  # its converters raise many classes
        reason = " ".join(str(error).split())[:300]
        raise Unsuitable(f"onnxmltools cannot convert it: {reason}") from error


def _finished(
    facts: dict[str, Any],
    graph: Any,
    names: list[str],
    values: np.ndarray,
    classes: Any,
    is_class: bool,
    target: Path,
) -> Adapted:
    target.write_bytes(graph.SerializeToString())
    if is_class and values.ndim == 1:  # the converted model has both probabilities
        values = np.stack([1 - values, values], axis=1)
    outputs = {"values": values}
    facts |= {
        "layout": "matrix",
        "columns": names,
        "categories": [],
        "known": {},
        "limits": {"missing": [], "unknown": []},
        "output": graph.graph.output[-1].name,
        "task_type": "classification" if is_class else "regression",
        "outputs": "probabilities" if is_class else "values",
    }
    if is_class:
        facts["classes"] = None if classes is None else np.asarray(classes).tolist()
        outputs["labels"] = values.argmax(axis=1)
    return facts, outputs
