"""Simple models to compare the network with: a linear one and a gradient-boosted one.

Both are from scikit-learn and use the same encoded arrays as the network. Shapes: N records, F
features, K classes, T tokens of all records.
"""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

from train.data import batch_sampler
from train.data.dataset import EncodedDataset
from train.metrics import pinball
from train.stats import paired_interval
from train.tasks import Arrays, Categories, ClassTarget, Numbers, Task, Texts, ValueTarget
from train.values.ragged import Ragged, StoredArrays, take

LINEAR, BOOSTED = "linear", "gradient-boosted"
# Most training records that are used, so that fitting takes less time than training a network.
MAX_RECORDS = 100_000
MAX_LINEAR_RECORDS = 30_000
# Dimensions to which TF-IDF vectors are reduced for the trees.
TEXT_DIMENSIONS = 50
# Most categories of a column that scikit-learn's histogram trees accept.
MAX_CATEGORIES = 255


@dataclass(frozen=True)
class SimpleModel:
    """A fitted simple model.

    metrics: by name, "valid_…" and "test_…". seconds: time to fit it. outputs: of the test split.
    """

    name: str
    metrics: dict[str, float]
    seconds: float
    outputs: Arrays


def fit_simple_models(data: EncodedDataset, seed: int) -> list[SimpleModel]:
    """Fit the simple models to the training records; return them in order of validation loss.

    The list is empty for images, for several labels per record, and for custom encoders or targets.
    """
    task = data.task.calibrated(1.0)
    known = (Numbers, Categories, Texts)
    if type(task.target) not in (ClassTarget, ValueTarget) or not all(
        isinstance(encoder, known) for encoder in task.features.encoders
    ):
        return []
    inputs, targets_N = data.open("train")
    order = batch_sampler.random_stream(seed, 0, "simple").permutation(len(targets_N))
    held_out = {name: data.open(name) for name in ("valid", "test")}
    models = []
    for name, build, most in (
        (LINEAR, _linear, MAX_LINEAR_RECORDS),
        (BOOSTED, _boosted, MAX_RECORDS),
    ):
        ids = np.sort(order[:most])
        drawn = take(inputs, ids)
        if found := _fitted(name, build, task, drawn, targets_N[ids], held_out):
            models.append(found)
    return sorted(models, key=lambda model: model.metrics["valid_loss"])


def compare_with_simple(
    task: Task, model: SimpleModel, outputs: Arrays, targets: np.ndarray
) -> tuple[float, float, float]:
    """Return a network's mean loss on the test split minus a simple model's, and its interval.

    The result is (difference, low, high) with the ends of the 95 % interval. outputs: {"logits":
    float32 [N, K]} of the network. targets: as the task encodes them, [N]. The loss is the log
    loss, the squared error divided by the variance of the target, or the quantile loss in units of
    the target's scale.
    """
    net_N = _losses(task, outputs, targets)
    simple_N = _losses(task.calibrated(1.0), model.outputs, targets)
    return float((net_N - simple_N).mean()), *paired_interval(simple_N, net_N, binary=False)


def _losses(task: Task, outputs: Arrays, targets_N: np.ndarray) -> np.ndarray:
    """Return the loss of each record, float64 [N]."""
    if isinstance(task.target, ClassTarget):
        probabilities_NK = task.target.decode(outputs)["probabilities"]
        chosen_N = probabilities_NK[np.arange(len(targets_N)), targets_N]
        losses_N: np.ndarray = -np.log(np.maximum(chosen_N.astype(np.float64), 1e-12))
        return losses_N
    error_N = outputs["logits"][:, 0].astype(np.float64) - targets_N
    if isinstance(task.target, ValueTarget) and task.target.quantile is not None:
        return pinball(-error_N, task.target.quantile)
    return error_N**2 / max(float(np.var(targets_N.astype(np.float64))), 1e-12)


def _fitted(
    name: str,
    build: Any,
    task: Task,
    inputs: StoredArrays,
    targets_N: np.ndarray,
    held_out: Mapping[str, tuple[StoredArrays, np.ndarray]],
) -> SimpleModel | None:
    """Fit all candidates of a kind; return the one with the lowest validation loss, if any."""
    began = time.perf_counter()
    found = []
    with warnings.catch_warnings():
        # Warnings about linear models that do not converge and about rare classes.
        warnings.simplefilter("ignore")
        for features, model in build(task, inputs):
            model.fit(features(inputs), targets_N)
            outputs = {
                split: _outputs(task, model, features(arrays))
                for split, (arrays, _) in held_out.items()
            }
            metrics: dict[str, float] = {}
            for split, (_, targets) in held_out.items():
                metrics |= task.metrics(outputs[split], targets, split)
            found.append((metrics, outputs["test"]))
    if not found:
        return None
    metrics, test = min(found, key=lambda each: each[0]["valid_loss"])
    return SimpleModel(name, metrics, round(time.perf_counter() - began, 3), test)


def _outputs(task: Task, model: Any, features_NF: Any) -> Arrays:
    """Return outputs in a network's form: log probabilities of classes, or scaled values."""
    if isinstance(task.target, ValueTarget):
        return {"logits": model.predict(features_NF)[:, None].astype(np.float32)}
    logs_NK = np.full((features_NF.shape[0], task.target.num_outputs), np.log(1e-9), np.float32)
    logs_NK[:, model.classes_] = np.log(np.maximum(model.predict_proba(features_NF), 1e-9))
    return {"logits": logs_NK}


def _linear(task: Task, inputs: StoredArrays) -> list[tuple[Any, Any]]:
    """Return logistic or ridge regressions on scaled numbers, category indicators and TF-IDF.

    The list is empty for a quantile, because its linear program takes longer than a network.
    """
    if isinstance(task.target, ValueTarget) and task.target.quantile is not None:
        return []
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    steps: list[tuple[str, Any]] = []
    for encoder, (name, array) in zip(task.features.encoders, inputs.items(), strict=True):
        if isinstance(encoder, Numbers):
            numbers = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler())
            steps.append((name, numbers.fit(array)))
        elif isinstance(encoder, Categories):
            # Names that occur fewer than 5 times are too rare to learn from.
            indicators = OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=5)
            steps.append((name, indicators.fit(array)))
        else:
            assert isinstance(encoder, Texts)
            steps.append((name, _Tfidf(encoder.size).fit(array)))

    def features(arrays: StoredArrays) -> Any:
        parts = [scipy.sparse.csr_matrix(step.transform(arrays[name])) for name, step in steps]
        return scipy.sparse.hstack(parts).tocsr()

    if isinstance(task.target, ValueTarget):
        return [(features, Ridge(alpha)) for alpha in (1.0, 100.0)]
    return [(features, LogisticRegression(C=c, max_iter=300)) for c in (1.0, 0.03)]


def _boosted(task: Task, inputs: StoredArrays) -> list[tuple[Any, Any]]:
    """Return histogram-based gradient-boosted trees, with and without early stopping."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    texts = {}
    for encoder, (name, array) in zip(task.features.encoders, inputs.items(), strict=True):
        if isinstance(encoder, Texts):
            words = _Tfidf(encoder.size).fit(array)
            reduced = TruncatedSVD(min(TEXT_DIMENSIONS, encoder.size - 1), random_state=0)
            texts[name] = words, reduced.fit(words.transform(array))

    def parts(arrays: StoredArrays) -> list[np.ndarray]:
        found = (
            texts[name][1].transform(texts[name][0].transform(array)) if name in texts else array
            for name, array in arrays.items()
        )
        return [np.asarray(part, np.float64) for part in found]

    def features(arrays: StoredArrays) -> np.ndarray:
        return np.concatenate(parts(arrays), axis=1)

    # Columns with more categories are treated as numbers.
    is_category_F = np.concatenate(
        [
            (part.max(axis=0) < MAX_CATEGORIES) & isinstance(encoder, Categories)
            for encoder, part in zip(task.features.encoders, parts(inputs), strict=True)
        ]
    )
    kind = (
        HistGradientBoostingRegressor
        if isinstance(task.target, ValueTarget)
        else HistGradientBoostingClassifier
    )
    loss = {}
    if isinstance(task.target, ValueTarget) and task.target.quantile is not None:
        loss = {"loss": "quantile", "quantile": task.target.quantile}
    options = {"categorical_features": is_category_F, "random_state": 0, **loss}
    return [(features, kind(early_stopping=stop, **options)) for stop in (True, False)]


class _Tfidf:
    """Token ids of N texts → their TF-IDF, sparse float64 [N, F]."""

    def __init__(self, size: int) -> None:
        from sklearn.feature_extraction.text import TfidfTransformer

        self._size, self._weights = size, TfidfTransformer(sublinear_tf=True)

    def fit(self, tokens: Any) -> "_Tfidf":
        self._weights.fit(self._counts(tokens))
        return self

    def transform(self, tokens: Any) -> Any:
        return self._weights.transform(self._counts(tokens))

    def _counts(self, tokens: Ragged) -> Any:
        rows_T = np.repeat(np.arange(len(tokens)), tokens.lengths_N)
        ones_T = np.ones(len(rows_T))
        shape = len(tokens), self._size
        return scipy.sparse.csr_matrix((ones_T, (rows_T, tokens.values_T)), shape)


def describe_comparison(
    task: Task, models: list[SimpleModel], outputs: Arrays, targets: np.ndarray
) -> str:
    """Return a line that compares a network with the best simple model; "" if there are no models.

    outputs: {"logits": float32 [N, K]} of the network on the test split. targets: as the task
    encodes them, [N]. The line starts with "warning:" if the network is worse.
    """
    if not models:
        return ""
    loss = "squared error"
    if isinstance(task.target, ClassTarget):
        loss = "log loss"
    elif isinstance(task.target, ValueTarget) and task.target.quantile is not None:
        loss = "quantile loss"
    best = models[0]
    difference, low, high = compare_with_simple(task, best, outputs, targets)
    figures = f"its {loss} on the test split differs by {difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    if low > 0:
        return f"warning: the net is worse than a {best.name} model; {figures}"
    better = "better than" if high < 0 else "as good as"
    return f"the net is {better} a {best.name} model; {figures}"
