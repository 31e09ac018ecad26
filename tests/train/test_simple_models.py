"""Simple models to compare a net with, and its temperature, against scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from train.calibration import fit_temperature
from train.config import validate_config
from train.data import dataset
from train.simple_models import (
    BOOSTED,
    LINEAR,
    compare_with_simple,
    describe_comparison,
    fit_simple_models,
)
from train.tasks import Task


@pytest.fixture
def make(tmp_path, rng):
    """A function that encodes a frame as a run would and returns the data set."""

    def encode(frame, kinds, task_type):
        url = str(tmp_path / f"{task_type}.parquet")
        frame.to_parquet(url, index=False)
        options = {"name": "x", "target": "y", "task_type": task_type, "features": kinds}
        config = validate_config({**options, "data": {"train": url}})
        return dataset.prepare_dataset(config, str(tmp_path / "runs"))

    return encode


@pytest.fixture
def frame(rng):
    """Numbers, a category and a text, each of which is related to the class."""
    count = 3000
    x, z = rng.normal(size=(2, count))
    name = rng.choice(["a", "b", "c", None], count)
    text = np.where(x > 0, "good thing", "bad thing")
    score = 2 * x * z + 2 * (name == "a") + rng.logistic(size=count)
    label = np.where(score > 0, "yes", "no")
    return pd.DataFrame({"x": x, "z": z, "name": name, "text": text, "y": label, "score": score})


KINDS = {"x": "number", "z": "number", "name": "category"}


def test_trees_learn_interactions_that_a_linear_model_misses(make, frame):
    """The class depends on the product of two numbers."""
    models = fit_simple_models(make(frame, KINDS, "classification"), seed=0)
    assert [model.name for model in models] == [BOOSTED, LINEAR]
    boosted, linear = models
    assert boosted.metrics["test_auc"] > linear.metrics["test_auc"] + 0.1
    assert boosted.metrics["valid_loss"] < linear.metrics["valid_loss"]


def test_the_linear_model_matches_scikit_learn(make, frame, rng):
    data = make(frame.assign(x=frame["x"].where(rng.random(3000) > 0.1)), KINDS, "classification")
    (linear,) = (model for model in fit_simple_models(data, seed=0) if model.name == LINEAR)

    def features(name):
        inputs, targets_N = data.open(name)
        numbers_NF, codes_N = inputs["numbers"], inputs["categories"][:, 0]
        missing_N = np.isnan(numbers_NF[:, 0])
        known_NF = np.where(np.isnan(numbers_NF), means_F, numbers_NF)
        names_N3 = np.eye(10)[codes_N]
        return np.c_[(known_NF - means_F) / scales_F, missing_N, names_N3], targets_N

    train_NF = data.open("train")[0]["numbers"]
    means_F = np.nanmean(train_NF, axis=0)
    scales_F = np.where(np.isnan(train_NF), means_F, train_NF).std(axis=0)
    found = []
    for c in (1.0, 0.03):
        model = LogisticRegression(C=c, max_iter=1000).fit(*features("train"))
        found.append({name: model.score(*features(name)) for name in ("valid", "test")})
    expected = [each["test"] for each in found]
    assert min(abs(linear.metrics["test_accuracy"] - each) for each in expected) < 0.005


@pytest.mark.parametrize("kinds", [{"text": "text"}, {**KINDS, "text": "text"}])
def test_both_models_learn_from_words(make, frame, kinds):
    labelled = frame.assign(y=np.where(frame["x"] > 0, "up", "down"))
    for model in fit_simple_models(make(labelled, kinds, "classification"), seed=0):
        assert model.metrics["test_accuracy"] > 0.99


def test_metrics_of_values_are_in_the_unit_of_the_target(make, frame):
    data = make(frame.assign(y=1000 + 50 * frame["x"]), KINDS, "regression")
    linear = next(model for model in fit_simple_models(data, seed=0) if model.name == LINEAR)
    assert linear.metrics["test_r2"] > 0.999
    assert linear.metrics["test_rmse"] < 2


def test_images_have_no_simple_model(digits):
    assert fit_simple_models(digits, seed=0) == []
    assert describe_comparison(digits.task, [], {}, np.zeros(0)) == ""


def test_a_net_worse_than_a_simple_model_gets_a_warning(make, frame):
    data = make(frame, KINDS, "classification")
    models = fit_simple_models(data, seed=0)
    _, targets_N = data.open("test")
    task = data.task
    same = models[0].outputs
    assert compare_with_simple(task, models[0], same, targets_N) == pytest.approx((0, 0, 0))
    assert "as good as a gradient-boosted model" in describe_comparison(
        task, models, same, targets_N
    )
    worse = {"logits": np.zeros_like(same["logits"])}
    difference, low, high = compare_with_simple(task, models[0], worse, targets_N)
    log_loss = task.metrics(worse, targets_N, "test")["test_loss"]
    assert difference == pytest.approx(log_loss - models[0].metrics["test_loss"], abs=1e-5)
    assert 0 < low < difference < high
    words = describe_comparison(task, models, worse, targets_N)
    assert words.startswith("warning: the net is worse than a gradient-boosted model")
    better = {"logits": 5 * np.eye(2, dtype=np.float32)[targets_N]}
    assert "the net is better than" in describe_comparison(task, models, better, targets_N)


# Temperature


def outputs_of(rng, count, temperature):
    """Return logits that are scaled by `temperature`, and labels drawn from the unscaled ones."""
    logits_NK = rng.normal(size=(count, 3)) * 2
    chances_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(axis=1, keepdims=True)
    targets_N = (rng.random((count, 1)) > chances_NK.cumsum(axis=1)).sum(axis=1)
    return {"logits": (logits_NK * temperature).astype(np.float32)}, targets_N


@pytest.fixture
def task(make, frame) -> Task:
    classes = np.random.default_rng(1).choice(["a", "b", "c"], 3000)
    return make(frame.assign(y=classes), KINDS, "classification").task


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_fitted_temperature_calibrates_probabilities(rng, task, temperature):
    outputs, targets_N = outputs_of(rng, 4000, temperature)
    found = fit_temperature(task, outputs, targets_N)
    assert found == pytest.approx(temperature, rel=0.1)
    losses = [task.calibrated(t).metrics(outputs, targets_N, "x")["x_loss"] for t in (1.0, found)]
    assert losses[1] < losses[0]
    decoded = task.calibrated(found).target.decode(outputs)
    by_hand = np.exp(outputs["logits"] / found)
    np.testing.assert_allclose(
        decoded["probabilities"], by_hand / by_hand.sum(axis=1, keepdims=True), rtol=1e-5
    )
    assert (decoded["label"] == task.target.decode(outputs)["label"]).all()
    restored = Task.from_dict(task.calibrated(found).to_dict())
    assert restored.target.temperature == found


def test_a_temperature_explained_by_chance_is_not_used(rng, task):
    taken = sum(fit_temperature(task, *outputs_of(rng, 200, 1.0)) != 1 for _ in range(200))
    assert taken / 200 < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 200)
