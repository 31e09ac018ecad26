"""Models of scikit-learn, and pipelines that end in XGBoost or LightGBM. Shapes: N records.

It runs in the isolated process. F features, K classes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from train.importing.isolated import Unsuitable
from train.importing.originals.boosted_trees import adapt_boosted
from train.importing.originals.sklearn_graph import ENCODERS, best_graph, inner_estimators
from train.importing.sample import Sample


def adapt_pickle(
    path: Path, sample: Sample, target: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a pickled model, which runs the code in it; write its ONNX graph to `target`.

    Returns what is known of it, and its own outputs for the sample, [N, …] by name. Raises
    Unsuitable if the model cannot be imported.
    """
    import joblib

    return _adapt(joblib.load(path), sample, target)


def adapt_skops(
    path: Path, sample: Sample, target: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a model that skops wrote, which runs no code; for the rest see `adapt_pickle`.

    Returns its own outputs, [N, …] by name. Raises Unsuitable for types that skops does not trust.
    """
    try:
        from skops import io
    except ImportError as error:
        raise Unsuitable("it needs skops; install it with: pip install skops") from error
    if unknown := io.get_untrusted_types(file=path):
        raise Unsuitable(f"skops does not trust its type {unknown[0]}")
    return _adapt(io.load(path), sample, target)


def _adapt(
    model: Any, sample: Sample, target: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if (found := adapt_boosted(model, sample, target)) is not None:
        return found
    from sklearn.base import BaseEstimator, is_classifier, is_regressor

    model = getattr(model, "best_estimator_", model)  # of a search for hyperparameters
    if not isinstance(model, BaseEstimator):
        raise Unsuitable(
            f"it holds a {type(model).__module__}.{type(model).__qualname__}; expected a model of "
            "scikit-learn, XGBoost or LightGBM"
        )
    if not (is_classifier(model) or is_regressor(model)):
        raise Unsuitable(f"a {type(model).__name__} is neither a classifier nor a regressor")
    return _adapt_estimator(model, sample, target)


def _adapt_estimator(
    model: Any, sample: Sample, target: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    import sklearn
    from sklearn.base import is_classifier

    wanted = getattr(model, "feature_names_in_", None)
    names = sample.choose(
        None if wanted is None else [str(name) for name in wanted],
        getattr(model, "n_features_in_", len(sample.texts)),
    )
    parts = list(inner_estimators(model))
    known = _known_categories(parts, names)
    categories = {name for name in names if name not in sample.numbers or name in known}
    by_column = wanted is not None
    inputs: Any = sample.frame(names, categories) if by_column else sample.matrix(names)
    facts: dict[str, Any] = {
        "library": f"scikit-learn {sklearn.__version__}",
        "model": type(parts[-1] if hasattr(model, "steps") else model).__name__,
        "columns": names,
        "categories": sorted(categories),
        "known": {name: list(found) for name, found in known.items() if name in categories},
    }
    if hasattr(model, "steps"):
        facts["model"] = f"Pipeline with {type(model.steps[-1][1]).__name__}"
    outputs = {}
    if is_classifier(model):
        classes = model.classes_
        if isinstance(classes, list) or np.ndim(classes) != 1:
            raise Unsuitable("it predicts several targets; one is supported")
        facts |= {"task_type": "classification", "classes": classes.tolist()}
        outputs["labels"] = np.searchsorted(classes, model.predict(inputs))
        if hasattr(model, "predict_proba"):
            facts["outputs"] = "probabilities"
            outputs["values"] = np.asarray(model.predict_proba(inputs), np.float64)
            _check_labels(outputs["labels"], outputs["values"])
        elif not hasattr(model, "decision_function"):
            raise Unsuitable("it has labels only, neither probabilities nor scores")
        else:
            facts["outputs"] = "scores"
            outputs["values"] = np.asarray(model.decision_function(inputs), np.float64)
    else:
        facts |= {"task_type": "regression", "outputs": "values"}
        outputs["values"] = np.asarray(model.predict(inputs), np.float64)
        if outputs["values"].ndim > 1 and outputs["values"].shape[1] != 1:
            raise Unsuitable("it predicts several targets; one is supported")

    def run(one: Sample) -> np.ndarray:
        given: Any = one.frame(names, categories) if by_column else one.matrix(names)
        model.predict(given)
        known = model.predict_proba if hasattr(model, "predict_proba") else model.predict
        found = np.asarray(known(given))
        return found if found.dtype.kind == "f" else np.zeros(1)

    facts["limits"] = sample.find_limits(names, categories, run)
    layout, graph = best_graph(model, names, categories, inputs, outputs)
    target.write_bytes(graph.SerializeToString())
    return facts | {"layout": layout, "output": graph.graph.output[0].name}, outputs


def _check_labels(labels_N: np.ndarray, probabilities_NK: np.ndarray) -> None:
    rows_N = np.arange(len(labels_N))
    gaps_N = probabilities_NK.max(axis=1) - probabilities_NK[rows_N, labels_N]
    if count := int(np.sum(gaps_N > 1e-6)):
        raise Unsuitable(
            f"its labels are not its most probable classes in {count:,} of {len(rows_N):,} "
            "records, as with SVC(probability=True); train it with CalibratedClassifierCV instead"
        )


def _known_categories(parts: list[Any], names: list[str]) -> dict[str, list[str]]:
    """Return the texts that encoders in the model know, by column."""
    found: dict[str, list[str]] = {}
    for part in parts:
        if type(part).__name__ != "ColumnTransformer" or not hasattr(part, "transformers_"):
            continue
        for _, transformer, chosen in part.transformers_:
            columns = [
                names[each] if isinstance(each, int) else str(each) for each in _list(chosen)
            ]
            for encoder in inner_estimators(transformer):
                fitted = getattr(encoder, "categories_", None)
                if fitted is None or len(fitted) != len(columns):
                    continue
                for column, values in zip(columns, fitted, strict=True):
                    if texts := [value for value in values if isinstance(value, str)]:
                        found[column] = texts
    encoders = [each for each in parts if type(each).__name__ in ENCODERS]
    if not found and len(encoders) == 1 and len(encoders[0].categories_) == len(names):
        for column, values in zip(names, encoders[0].categories_, strict=True):
            if texts := [value for value in values if isinstance(value, str)]:
                found[column] = texts
    return found


def _list(chosen: Any) -> list[Any]:
    return list(chosen) if isinstance(chosen, list | tuple | np.ndarray) else []
