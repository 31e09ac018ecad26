"""The model card: its metrics against scikit-learn and pandas, and its HTML."""

import io
import json
import math
import re
import shlex
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from PIL import Image
from scipy.stats import binomtest

from tests.conftest import make_config
from train import reports
from train.bundle import Manifest, feature_statistics
from train.bundle.manifest import BundleFile, TensorMetadata, Timing, Variant
from train.reports.slices import LEAST_RECORDS, all_slices, class_metrics, worst_slices
from train.tasks import ClassTarget, Features, LabelsTarget, Task, ValueTarget
from train.tasks.task import TARGETS

MARKUP = "<img src=x onerror=alert(1)> & \"'\x07"


@pytest.fixture
def passengers(rng) -> pd.DataFrame:
    count = 900
    return pd.DataFrame(
        {
            "age": np.where(rng.random(count) < 0.1, np.nan, rng.integers(1, 80, count)),
            "fare": rng.gamma(1.5, 20, count).round(2),
            "parents": rng.choice([0, 0, 0, 0, 0, 1, 2, 3, 4, 5], count),
            "sex": rng.choice(["male", "female"], count),
            "port": rng.choice(["S", "C", "Q", None, "rare"], count, p=[0.5, 0.3, 0.1, 0.09, 0.01]),
            "alone": rng.choice([True, False], count),
            "remark": [" ".join(["ship"] * number) for number in rng.integers(1, 30, count)],
        }
    )


KINDS = {
    "age": "number",
    "fare": "number",
    "parents": "number",
    "sex": "category",
    "port": "category",
    "alone": "boolean",
    "remark": "text",
}


def fitted(frame, values, task_type, kinds=None):
    """Return a task fitted on a table, its input arrays and its targets."""
    kinds = {name: {"kind": kind} for name, kind in (kinds or KINDS).items()}
    columns = {name: frame[name].to_list() for name in kinds}
    features = Features.of(kinds, max_tokens=32).fit(columns)
    target = TARGETS[task_type]("y").fit(values)
    return Task(features, target), features.encode(columns), target.encode(values)


def guesses(rng, targets_N, num_classes, right=0.7):
    """Return logits [N, K] that are right for about this share of the records."""
    logits_NK = rng.normal(size=(len(targets_N), num_classes)).astype(np.float32)
    sure = np.flatnonzero(rng.random(len(targets_N)) < right)
    logits_NK[sure, targets_N[sure]] += 5
    return {"logits": logits_NK}


def variant(**changes):
    timings = [
        Timing(
            engine="onnxruntime",
            threads=1,
            batch_size=size,
            p50_ms=0.1 * size,
            low_ms=0.1,
            high_ms=0.2,
        )
        for size in (1, 32)
    ]
    return Variant(
        **{
            "engine": "onnxruntime",
            "file": "variants/fp32/model.onnx",
            "recipe": {},
            "verdict": "accepted",
            "reason": "the reference for the other variants",
            "metrics": {"valid_accuracy": 0.75, "test_accuracy": 0.7},
            "drop": [0.0, -0.01, 0.01],
            "agreement": 1.0,
            "change": 0.0,
            "batch_difference": 0.0,
            "size_bytes": 12345,
            "profile": timings,
            "golden_tolerance": 0.001,
            **changes,
        }
    )


def manifest_of(task, count, **changes):
    config = make_config(target="y", optim={"epochs": 2, "lr": 0.0123})
    split = {"source": "data/table.csv", "num_records": count}
    return Manifest(
        **{
            "name": "passengers",
            "created": "2026-11-22T18:30:00+00:00",
            "task": task.to_dict(),
            "inputs": [TensorMetadata.of(spec) for spec in task.features.fields],
            "outputs": [TensorMetadata.of(spec) for spec in task.target.outputs],
            "files": {"weights.safetensors": BundleFile(sha256="ab" * 32, size_bytes=4321)},
            "versions": {"torch": "2.13.0"},
            "seed": 7,
            "data": {"digest": "cd" * 32, "train": split, "valid": split, "test": split},
            "config": config.model_dump(mode="json"),
            "metrics": {"valid_accuracy": 0.75, "test_accuracy": 0.7},
            "variants": {
                "fp32": variant(),
                "int8_static": variant(verdict="refused", reason="accuracy fell by 0.2"),
            },
            "skipped": {"int8_dynamic": "no engine on this machine reads it"},
            "default_variant": "fp32",
            "optimize_for": "throughput",
            "eager": [],
            "host": {"cpu": "one"},
            "training_seconds": 12.5,
            **changes,
        }
    )


def png():
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(stream, "PNG")
    return stream.getvalue()


def baseline_of(task, inputs, outputs):
    """Return the baseline of these records as training writes it."""
    answers = task.target.decode(outputs)
    states = {}
    for name, measured in feature_statistics.measure_quantities(task, inputs, answers).items():
        if measured.kind == "category":
            edges, shape = (), (len(measured.labels),)
        else:
            edges = feature_statistics.bin_edges(measured, name)
            shape = (*measured.values.shape[1:], len(edges) + 2)
        empty = feature_statistics.Quantity(
            measured.kind, measured.of, np.zeros(shape, int), edges, measured.labels
        )
        counts = empty.count(measured.values)
        states[name] = {**empty.to_dict(), "counts": counts.tolist()}
    return {"version": feature_statistics.VERSION, "quantities": states}


def made(task, inputs, targets, outputs, **changes):
    given = {
        "baseline": baseline_of(task, inputs, outputs),
        "history": [{"epoch": n, "seconds": 2.5, f"valid_{task.metric}": 0.1 * n} for n in (1, 2)],
        "pictures": {"curves": png()},
        "notes": "records: 900 train",
        **changes,
    }
    manifest = given.pop("manifest", None) or manifest_of(task, len(targets))
    return reports.render_card(manifest, inputs, targets, outputs, **given)


def tree(page):
    """Return the page, parsed strictly as XML."""
    first, rest = page.split("\n", 1)
    assert first == "<!doctype html>"
    return ElementTree.fromstring(rest)


def section(page, title):
    return next(each for each in tree(page).iter("section") if each.find("h2").text == title)


def rows(page, title, number=0):
    """Return the rows of a table in a section, as texts."""
    body = list(section(page, title).iter("tbody"))[number]
    return [["".join(cell.itertext()) for cell in line] for line in body]


@pytest.fixture
def classes(passengers, rng):
    values = rng.choice(["a", "b", "c"], len(passengers), p=[0.6, 0.3, 0.1]).tolist()
    task, inputs, targets_N = fitted(passengers, values, "classification")
    return task, inputs, targets_N, guesses(rng, targets_N, 3)


def test_metrics_by_class_match_scikit_learn(classes):
    task, _, targets_N, outputs = classes
    chosen_N = outputs["logits"].argmax(axis=1)
    expected = sklearn.metrics.precision_recall_fscore_support(targets_N, chosen_N)
    found = class_metrics(task.target, outputs, targets_N)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([getattr(each, name) for each in found], column, atol=1e-12)
    shown = {line[0]: line[1:5] for line in rows(made(*classes), "Metrics by class")}
    for name, *values, support in zip(task.target.classes, *expected, strict=True):
        assert shown[name] == [*(f"{value:.3f}" for value in values), str(support)]


def test_a_class_never_predicted_or_never_true_counts_as_0():
    target = ClassTarget("y").fit(["a", "b", "c"])
    outputs = {"logits": np.eye(3, dtype=np.float32)[[0, 0, 2]]}
    found = class_metrics(target, outputs, np.array([0, 1, 0]))
    assert [(each.precision, each.recall, each.f1) for each in found[1:]] == [(0, 0, 0)] * 2


def test_metrics_by_label_match_scikit_learn(passengers, rng):
    values = [
        "|".join(name for name in ("x", "y", "z") if rng.random() < 0.4)
        for _ in range(len(passengers))
    ]
    task, inputs, targets_NK = fitted(passengers, values, "multilabel")
    outputs = {"logits": (rng.normal(size=(900, 3)) + 2 * targets_NK - 1).astype(np.float32)}
    chosen_NK = outputs["logits"] >= 0
    expected = sklearn.metrics.precision_recall_fscore_support(targets_NK, chosen_NK)
    found = class_metrics(task.target, outputs, targets_NK)
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([getattr(each, name) for each in found], column, atol=1e-12)
    share = np.mean(np.all(chosen_NK == targets_NK, axis=1))
    sexes = [s for s in all_slices(task, inputs, targets_NK, outputs) if s.quantity == "sex"]
    total = sum(each.figure * each.count for each in sexes) / len(passengers)
    assert math.isclose(total, share)
    assert isinstance(task.target, LabelsTarget)
    tree(made(task, inputs, targets_NK, outputs))


def test_slices_match_pandas(classes, passengers):
    task, inputs, targets_N, outputs = classes
    right = pd.Series(outputs["logits"].argmax(axis=1) == targets_N)
    lengths = passengers["remark"].str.split().str.len()
    parts = {
        "sex": passengers["sex"],
        "port": passengers["port"].fillna("(missing)"),
        "alone": passengers["alone"].map({True: "true", False: "false"}),
        "age": pd.qcut(passengers["age"], 4).astype(object).fillna("(missing)"),
        "fare": pd.qcut(passengers["fare"], 4),
        "remark.length": pd.qcut(lengths, 4),
        # Most records have the smallest value.
        "parents": pd.cut(passengers["parents"], [-1, 0, passengers["parents"].quantile(0.75), 5]),
    }
    found = all_slices(task, inputs, targets_N, outputs)
    assert {each.quantity for each in found} == parts.keys()
    for quantity, part in parts.items():
        groups = [group for _, group in right.groupby(part, observed=True)]
        expected = [
            (len(group), group.mean(), *wilson(group.sum(), len(group)))
            for group in groups
            if len(group) >= LEAST_RECORDS
        ]
        slices = [each for each in found if each.quantity == quantity]
        figures_of = [(each.count, each.figure, each.low, each.high) for each in slices]
        np.testing.assert_allclose(sorted(figures_of), sorted(expected), atol=1e-6)
    for quantity in ("sex", "port", "alone"):
        for each in (each for each in found if each.quantity == quantity):
            assert each.count == (parts[quantity] == each.values).sum()
    named = {(each.quantity, each.values) for each in found}
    assert {("age", "(missing)"), ("parents", "0")} <= named
    assert ("port", "rare") not in named
    assert [each.figure for each in found] == sorted(each.figure for each in found)


def wilson(right, count):
    interval = binomtest(int(right), count).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def test_slices_of_a_regression_show_rmse_in_the_targets_unit(passengers, rng):
    values_N = passengers["fare"].to_numpy() * 3 + rng.normal(size=len(passengers))
    kinds = {"sex": "category", "age": "number"}
    task, inputs, targets_N = fitted(passengers, values_N.tolist(), "regression", kinds)
    noise_N = np.where(passengers["sex"] == "male", 5.0, 1.0) * rng.normal(size=len(passengers))
    assert isinstance(task.target, ValueTarget)
    scaled_N = (values_N + noise_N - task.target.mean) / task.target.scale
    outputs = {"logits": scaled_N[:, None].astype(np.float32)}
    found = all_slices(task, inputs, targets_N, outputs)
    for sex, group in pd.Series(noise_N).groupby(passengers["sex"]):
        (each,) = (s for s in found if (s.quantity, s.values) == ("sex", sex))
        rmse = math.sqrt((group**2).mean())
        assert each.figure == pytest.approx(rmse, rel=1e-3)
        deviation = (group**2).std() / math.sqrt(len(group)) / (2 * rmse)
        assert each.high - each.low == pytest.approx(2 * 1.96 * deviation, rel=0.3)
        assert each.low < rmse < each.high
    assert (found[0].quantity, found[0].values) == ("sex", "male")
    page = made(task, inputs, targets_N, outputs)
    assert rows(page, "Weak slices")[0][:2] == ["sex", "male"]
    assert not class_metrics(task.target, outputs, targets_N)


def test_images_are_sliced_by_quartiles_of_brightness(rng):
    levels_N = rng.integers(0, 250, 200)
    images = [np.full((4, 4, 3), level, np.uint8) for level in levels_N]
    labels = rng.choice(["a", "b"], 200).tolist()
    kinds = {"photo": "image"}
    task, inputs, targets_N = fitted(
        pd.DataFrame({"photo": images}), labels, "classification", kinds
    )
    outputs = guesses(rng, targets_N, 2)
    found = all_slices(task, inputs, targets_N, outputs)
    right = pd.Series(outputs["logits"].argmax(axis=1) == targets_N)
    expected = right.groupby(pd.qcut(levels_N, 4)).mean()
    assert {each.quantity for each in found} == {"photo.brightness"}
    assert sorted(each.figure for each in found) == pytest.approx(sorted(expected))


def test_images_of_free_height_are_measured_without_padding(rng):
    levels_N, heights_N = rng.integers(1, 250, 200), rng.integers(16, 32, 200)
    pairs = zip(levels_N, heights_N, strict=True)
    images = [np.full((height, 8, 3), level, np.uint8) for level, height in pairs]
    labels = rng.choice(["a", "b"], 200).tolist()
    features = Features.of({"photo": {"kind": "image", "size": (None, 8)}})
    task = Task(features.fit({"photo": images}), ClassTarget("y").fit(labels))
    inputs, targets_N = task.features.encode({"photo": images}), task.target.encode(labels)
    measured = feature_statistics.measure_quantities(task, inputs, None)
    np.testing.assert_allclose(measured["photo.brightness"].values, levels_N, rtol=1e-5)
    np.testing.assert_allclose(measured["photo.red"].values, levels_N, rtol=1e-5)
    np.testing.assert_array_equal(measured["photo.height"].values, heights_N)
    found = all_slices(task, inputs, targets_N, guesses(rng, targets_N, 2))
    assert {each.quantity for each in found} == {"photo.brightness", "photo.height"}


def test_only_slices_worse_than_the_average_are_shown(classes, passengers, rng):
    task, inputs, targets_N, _ = classes
    # Predictions for men are wrong four times as often as for women.
    wrong_N = rng.random(len(targets_N)) < np.where(passengers["sex"] == "male", 0.4, 0.1)
    answers_N = np.where(wrong_N, (targets_N + 1) % len(task.target.classes), targets_N)
    outputs = {"logits": 5 * np.eye(len(task.target.classes), dtype=np.float32)[answers_N]}
    worst = worst_slices(task, inputs, targets_N, outputs)
    assert (worst[0].quantity, worst[0].values) == ("sex", "male")
    assert all(each.high < 1 - wrong_N.mean() for each in worst)
    assert len(worst) <= 3 < len(all_slices(task, inputs, targets_N, outputs))
    shown = rows(made(task, inputs, targets_N, outputs), "Weak slices")
    assert [line[:2] for line in shown] == [[each.quantity, each.values] for each in worst]


class Balance(HTMLParser):
    """HTML parser that checks that every opened element is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.attributes += [(tag, *each) for each in attrs]

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *each) for each in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing_external(classes):
    page = made(*classes)
    reader = Balance()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    tree(page)
    for _, name, value in reader.attributes:
        assert name not in ("href", "srcset", "action")
        assert not name.startswith("on")
        assert name != "src" or value.startswith("data:image/png;base64,")
    assert not re.search(r"https?://|//\w+\.\w|@import|url\(|<script|<link|<iframe", page)
    assert "prefers-color-scheme: dark" in page


def test_markup_in_names_and_data_is_shown_as_text(passengers, rng):
    frame = passengers.assign(sex=np.where(passengers["sex"] == "male", MARKUP, "female"))
    frame = frame.rename(columns={"port": MARKUP + "port"})
    kinds = {"sex": "category", MARKUP + "port": "category"}
    labels = rng.choice([MARKUP, "</td></table><script>"], len(frame)).tolist()
    task, inputs, targets_N = fitted(frame, labels, "classification", kinds)
    outputs = guesses(rng, targets_N, 2, right=1)
    # So that its slice is among the worst ones.
    outputs["logits"][(frame["sex"] == MARKUP).to_numpy()] *= -1
    refused = variant(reason=MARKUP)
    page = made(
        task,
        inputs,
        targets_N,
        outputs,
        notes=MARKUP,
        manifest=manifest_of(
            task,
            len(frame),
            skipped={"x": MARKUP},
            variants={"fp32": refused},
            host={"cpu": MARKUP},
        ),
    )
    elements = list(tree(page).iter())
    assert not any(element.tag == "script" for element in elements)
    assert all(
        element.attrib.keys() == {"src", "alt"} for element in elements if element.tag == "img"
    )
    shown = MARKUP.replace("\x07", "\ufffd")
    assert {line[0] for line in rows(page, "Metrics by class")} == {shown, "</td></table><script>"}
    assert shown in [line[1] for line in rows(page, "Weak slices")]


def test_the_card_lists_data_digests_variants_and_options(classes):
    page = made(*classes)
    words = "".join(tree(page).itertext())
    for said in (
        "data/table.csv",
        "cd" * 32,
        "ab" * 32,
        "accuracy fell by 0.2",
        "no engine on this machine reads it",
        "2 epochs in 5.0 s",
        "records: 900 train",
        "/v1/models/passengers:predict",
        "Predictor.load",
    ):
        assert said in words
    options = dict(rows(page, "Training"))
    assert options["optim.lr"] == "0.0123"
    assert "optim.momentum" not in options
    assert not any(name.startswith("features") for name in options)


def test_each_quantity_of_the_baseline_has_a_bar_chart(classes):
    page = made(*classes)
    drawn = section(page, "Reference distributions")
    bars = {part.find("b").text: len(list(part.iter("rect"))) for part in drawn.find("div")}
    assert bars["sex"] == 4  # two names, unseen and missing
    assert bars["prediction"] == 3
    assert bars["fare"] == feature_statistics.NUM_BINS
    assert "probabilities" not in bars


@pytest.mark.parametrize(
    "quantity",
    [
        {"kind": "number", "of": "inputs", "edges": [1.0, 2.0]},
        {"kind": "number", "of": "inputs", "edges": [1.0, 2.0], "counts": []},
        {"kind": "number", "of": "inputs", "edges": [1.0, 2.0], "counts": [0, 0, 0, 0]},
        {"kind": "number", "of": "inputs", "edges": [3.0, 3.0], "counts": [1, 0, 5, 0]},
        {"kind": "category", "of": "inputs", "labels": ["a"]},
    ],
)
def test_a_quantity_without_counts_does_not_break_the_card(classes, quantity):
    tree(made(*classes, baseline={"version": 2, "quantities": {"age": quantity}}))
    tree(made(*classes, baseline={"version": 1}))


def test_the_shell_example_sends_a_record_of_the_models_fields(classes):
    page = made(*classes)
    words = "".join(section(page, "Usage").itertext())
    command = shlex.split(words[words.index("curl") :])
    (record,) = json.loads(command[-1])["instances"]
    task = classes[0]
    assert tuple(record) == task.features.columns
    task.features.encode_records([record])


def test_classes_with_few_test_records_are_a_listed_limitation(passengers, rng):
    labels = ["rare"] * 5 + rng.choice(["a", "b"], len(passengers) - 5).tolist()
    task, inputs, targets_N = fitted(passengers, labels, "classification")
    page = made(task, inputs, targets_N, guesses(rng, targets_N, 3))
    limits = "".join(section(page, "Limitations").itertext())
    assert "whose metrics are uncertain: rare." in limits


@pytest.mark.ray
@pytest.mark.slow
def test_a_trained_bundle_has_its_card_with_a_digest(bundle):
    assert bundle.manifest.files["report/card.html"].size_bytes > 10_000
    page = (bundle.path / "report/card.html").read_text()
    digests = {name: digest for name, _, digest in rows(page, "Files")}
    assert digests.pop("baseline.json") == bundle.manifest.files["baseline.json"].sha256
    assert digests.keys() == bundle.manifest.files.keys() - {"baseline.json", "report/card.html"}
    assert len(rows(page, "Metrics by class")) == 10
