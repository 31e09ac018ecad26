"""The gate for variants, on constructed outputs with known differences."""

import numpy as np
import pytest

from train.compress import gate
from train.compress.variant_judge import VariantJudge
from train.config import validate_config
from train.data import dataset
from train.tasks import ClassTarget, Task
from train.tasks.regression import ValueTarget


def three_classes():
    features = Task.of({"x": {"kind": "number"}}, "y", "classification").features
    return Task(features, ClassTarget("y", ("a", "b", "c"), (1, 1, 1)))


def outputs_for(answers_N):
    return {"logits": np.eye(3, dtype=np.float32)[answers_N] * 5}


@pytest.mark.parametrize(
    ("lost", "won", "strict", "verdict"),
    [
        (0, 0, False, "accepted"),
        (5, 0, False, "accepted"),  # 0.005 exactly
        (6, 4, False, "accepted"),
        (8, 2, False, "undecided"),  # worse by 0.006, which chance may explain
        (14, 4, False, "undecided"),  # certainly worse, but perhaps by less than 0.005
        (30, 5, False, "refused"),
        (0, 0, True, "accepted"),
        (5, 0, True, "undecided"),  # within the limit, but its interval is not
        (30, 5, True, "refused"),
    ],
)
def test_the_gate_weighs_the_drop_and_its_interval(lost, won, strict, verdict):
    targets_N = np.zeros(1000, np.int64)
    before_N, after_N = np.zeros(1000, np.int64), np.zeros(1000, np.int64)
    before_N[:won], after_N[won : won + lost] = 1, 1
    comparison = gate.compare_with_fp32(
        three_classes(), outputs_for(before_N), outputs_for(after_N), targets_N
    )
    assert comparison.drop == pytest.approx((lost - won) / 1000)
    assert comparison.agreement == pytest.approx(1 - (lost + won) / 1000)
    judged = gate.judge_variant(comparison, 0.005, strict=strict)
    assert judged.verdict == verdict
    assert f"{comparison.value:.4f}" in judged.reason


def test_regression_variants_are_compared_by_r2(rng):
    task = Task(three_classes().features, ValueTarget("y", mean=0.0, scale=2.0))
    targets_N = np.linspace(-1, 1, 500).astype(np.float32)
    before = {"logits": targets_N[:, None]}
    noise_N = rng.normal(size=500).astype(np.float32) * np.sqrt(targets_N.var() / 100)
    after = {"logits": (targets_N + noise_N)[:, None]}
    comparison = gate.compare_with_fp32(task, before, after, targets_N)
    assert comparison.metric == "r2"
    assert comparison.drop == pytest.approx(np.mean(noise_N**2) / targets_N.var(), rel=1e-4)
    assert 0.008 < comparison.low < comparison.drop < comparison.high < 0.0125
    assert gate.judge_variant(comparison, 0.005).verdict == "refused"
    assert gate.judge_variant(comparison, 0.02).verdict == "accepted"


def test_a_metric_that_is_nan_is_refused():
    nothing = gate.VariantComparison(
        "accuracy", 0.9, float("nan"), float("nan"), 0.1, 0.2, 0.0, 0.0
    )
    assert gate.judge_variant(nothing, 0.5).verdict == "refused"


def test_a_net_with_equal_labels_but_other_probabilities_fails():
    answers_N = np.arange(300) % 3
    sharper = {"logits": outputs_for(answers_N)["logits"] * 3}
    comparison = gate.compare_with_fp32(three_classes(), outputs_for(answers_N), sharper, answers_N)
    assert comparison.drop == 0
    before = np.exp([5.0, 0, 0]) / np.exp([5.0, 0, 0]).sum()
    assert comparison.change == pytest.approx(1 - before[0], rel=1e-3)
    assert gate.judge_variant(comparison, 0.005).verdict == "accepted"
    assert gate.judge_variant(comparison, 0.005, max_change=0.01).verdict == "refused"


class Leaning:
    """Engine that adds a share of the batch's mean to each output, like a scale per batch."""

    def __init__(self, share):
        self._share = share

    def run(self, inputs):
        own = inputs["x"]
        return {"logits": own + self._share * own.mean(axis=0, keepdims=True)}


class Broken(Leaning):
    """Engine whose outputs for a large batch are NaN."""

    def run(self, inputs):
        logits = super().run(inputs)["logits"]
        return {"logits": logits * np.nan if len(logits) > 7 else logits}


def test_nan_outputs_count_as_an_infinite_difference(rng):
    inputs = {"x": rng.normal(size=(64, 1)).astype(np.float32)}
    task = Task(three_classes().features, ValueTarget("y", mean=0.0, scale=2.0))
    assert gate.batch_difference(task, Leaning(0.0), inputs) == 0
    assert gate.batch_difference(task, Broken(0.0), inputs) == np.inf
    outputs = {"logits": inputs["x"]}
    wrong = {"logits": np.where(np.arange(64)[:, None] == 9, np.nan, inputs["x"])}
    comparison = gate.compare_with_fp32(task, outputs, wrong, inputs["x"][:, 0] + 0.1)
    assert np.isnan(comparison.change)
    assert np.isnan(comparison.agreement)
    assert comparison.high == np.inf
    assert gate.judge_variant(comparison, 0.005, max_change=0.1).verdict == "refused"


def test_outputs_that_depend_on_the_batch_are_refused(rng):
    inputs = {"x": rng.normal(size=(64, 3)).astype(np.float32)}
    task = three_classes()
    assert gate.batch_difference(task, Leaning(0.0), inputs) == 0
    difference = gate.batch_difference(task, Leaning(1e-3), inputs)
    assert difference > gate.MAX_BATCH_DIFFERENCE
    targets_N = np.zeros(64, np.int64)
    same = gate.compare_with_fp32(task, {"logits": inputs["x"]}, {"logits": inputs["x"]}, targets_N)
    verdict = gate.judge_variant(same, 0.005, batch=difference)
    assert verdict.verdict == "refused"
    assert "batch" in verdict.reason


def test_variants_can_be_compared_by_any_metric_of_the_task(rng):
    targets_N = rng.integers(0, 3, 400)
    before = {"logits": rng.normal(size=(400, 3)) + 2 * np.eye(3)[targets_N]}
    after = {"logits": before["logits"] * 0.5}
    task = three_classes()
    comparison = gate.compare_with_fp32(task, before, after, targets_N, "valid_loss")
    losses = [task.metrics(each, targets_N, "valid")["valid_loss"] for each in (before, after)]
    assert (comparison.metric, comparison.reference, comparison.value) == ("loss", *losses)
    assert comparison.drop == pytest.approx(losses[1] - losses[0])
    assert comparison.low < comparison.drop < comparison.high
    assert gate.compare_with_fp32(task, before, after, targets_N).drop == 0


def test_the_comparison_applies_the_decision_rule(rng):
    """The largest probability gives the same labels, the threshold gives different ones."""
    task = Task(three_classes().features, ClassTarget("y", ("a", "b"), (9, 1)))
    targets_N = np.zeros(200, np.int64)
    before = {"logits": np.tile([2.0, 0.0], (200, 1))}
    after = {"logits": np.tile([1.0, 0.0], (200, 1))}
    assert gate.compare_with_fp32(task, before, after, targets_N).drop == 0
    with_rule = task.with_target(thresholds=(0.2,))
    comparison = gate.compare_with_fp32(with_rule, before, after, targets_N)
    assert (comparison.drop, comparison.agreement) == (1.0, 0.0)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The judge for a table with about 45 validation records, and its data set."""
    folder = tmp_path_factory.mktemp("few")
    rng = np.random.default_rng(0)
    x_N = rng.normal(size=450)
    rows = [f"{x},{int(x > 0)}" for x in x_N]
    (folder / "few.csv").write_text("\n".join(["x,y", *rows]))
    values = {"name": "few", "target": "y", "task_type": "classification"}
    config = validate_config(
        {**values, "features": {"x": "number"}, "data": {"train": str(folder / "few.csv")}}
    )
    data = dataset.prepare_dataset(config, str(folder / "runs"))
    return VariantJudge(config, data), data


def test_training_records_supplement_few_validation_records(judge):
    """Only by records that calibration did not use, and not for variants trained on them."""
    judge, data = judge
    num_valid = len(data.open("valid")[1])
    assert num_valid < 100
    judge.add_training(np.arange(50, 200))
    assert judge._compared_on(trained=False) == ["valid", "train"]
    assert judge._compared_on(trained=True) == ["valid"]
    inputs, targets_N = judge._splits["train"]
    np.testing.assert_array_equal(inputs["numbers"], data.open("train")[0]["numbers"][50:200])
    outputs = {
        split: {"logits": np.eye(2)[arrays[1]] * 4.0} for split, arrays in judge._splits.items()
    }
    wrong = {**outputs, "train": {"logits": np.eye(2)[1 - targets_N] * 4.0}}
    comparison = judge._compare(outputs, wrong, ["valid", "train"])
    assert comparison.drop == pytest.approx(150 / (num_valid + 150))
    assert judge._compare(outputs, wrong, ["valid"]).drop == 0
    assert f"compared on only {num_valid} validation records and 150" in judge._words(
        ["valid", "train"]
    )
