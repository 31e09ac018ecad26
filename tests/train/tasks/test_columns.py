"""Encoders of numbers, dates, categories, texts, and targets, against pandas and scikit-learn."""

import datetime
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from sklearn.feature_extraction.text import TfidfTransformer

from cluster.errors import UserError
from tests.conftest import make_config
from train.data.fit_notes import fit_notes
from train.data.fitting import define_task
from train.tasks import (
    Categories,
    Features,
    InvalidRecord,
    LabelsTarget,
    Numbers,
    Task,
    Texts,
    ValueTarget,
)
from train.tasks.columns.scalars import Boolean, Date, Number
from train.values.records import to_columns


def fitted(task: Task, columns, targets) -> Task:
    return replace(task, features=task.features.fit(columns), target=task.target.fit(targets))


def test_numbers_are_scaled_as_by_pandas_and_missing_are_nan():
    given = [1, "2.5", None, "", float("nan"), float("inf"), b"-4", np.float32(7), "N/A"]
    series = pd.Series([1, 2.5, None, None, None, None, -4, 7, None], dtype=float)
    numbers = Numbers((Number("x"),)).fit({"x": given})
    expected = (series - series.mean()) / series.std(ddof=0)
    np.testing.assert_allclose(numbers.encode({"x": given})["numbers"][:, 0], expected, rtol=1e-6)


def test_large_numbers_keep_their_differences():
    given = [1e12, 1e12 + 1, 1e12 + 2]
    encoded = Numbers((Number("x"),)).fit({"x": given}).encode({"x": given})["numbers"][:, 0]
    np.testing.assert_allclose(encoded, [-1.2247449, 0, 1.2247449], rtol=1e-6)


@pytest.mark.parametrize("value", ["abc", {"a": 1}, [1, 2], "1,5"])
def test_the_error_names_the_row_of_a_value_not_a_number(value):
    with pytest.raises(InvalidRecord, match=r"field 'x'.*expected a number") as caught:
        Number("x").read([1, value])
    assert caught.value.row == 1


def test_booleans_are_read_from_many_words():
    given = [True, False, "yes", "N", 1, 0.0, "T", None, np.bool_(True), b"false"]
    expected = [1, 0, 1, 0, 1, 0, 1, np.nan, 1, 0]
    np.testing.assert_array_equal(Boolean("b").read(given), expected)
    with pytest.raises(InvalidRecord, match="'perhaps'; expected true or false"):
        Boolean("b").read(["perhaps"])


def test_dates_agree_with_pandas_in_every_form():
    text = "2019-03-23 20:21:09"
    stamp = pd.Timestamp(text, tz="UTC").timestamp()
    moment = datetime.datetime(2019, 3, 23, 20, 21, 9)
    given = [text, "2019-03-23T21:21:09+01:00", moment, np.datetime64(text), text.encode(), None]
    np.testing.assert_array_equal(Date("d").read(given), [stamp] * 5 + [np.nan])
    as_array = np.array([text, "NaT"], "datetime64[s]")
    np.testing.assert_array_equal(Date("d").read(as_array), [stamp, np.nan])
    assert Date("d", "%d.%m.%Y %H:%M:%S").read(["23.03.2019 20:21:09"]) == [stamp]
    assert Date("d").read([datetime.date(1970, 1, 2)]) == [86400]
    with pytest.raises(InvalidRecord, match="'soon'; expected a date like 2026-11-22"):
        Date("d").read(["soon"])


def test_the_parts_of_a_date_are_cycles_of_day_week_and_year():
    given = ["2024-01-01", "2024-01-01 06:00", "2024-01-08", "2025-01-01"]
    numbers = Numbers((Date("d"),)).fit({"d": given})
    raw_NF = numbers.encode({"d": given})["numbers"] * numbers.scale_F + numbers.mean_F
    parts = dict(zip(numbers.names, raw_NF.T, strict=True))
    # A quarter of a day later the sine of the day is one; a week later the week's is the same.
    np.testing.assert_allclose(parts["d.day_sin"], [0, 1, 0, 0], atol=1e-4)
    assert parts["d.week_sin"][0] == pytest.approx(parts["d.week_sin"][2], abs=1e-4)
    assert parts["d.year_cos"][0] == pytest.approx(parts["d.year_cos"][3], abs=0.02)


def test_a_second_date_adds_the_time_since_the_first():
    given = {"a": ["2024-01-01", "2024-01-01"], "b": ["2024-01-01 00:01", "2024-01-02"]}
    numbers = Numbers((Date("a"), Date("b"))).fit(given)
    raw_NF = numbers.encode(given)["numbers"] * numbers.scale_F + numbers.mean_F
    np.testing.assert_allclose(raw_NF[:, numbers.names.index("b - a")], [60, 86400], rtol=1e-4)


def test_unseen_and_missing_categories_have_separate_codes():
    fitted = Categories(("c",)).fit({"c": ["b", "a", "b", None, 3, 3.0, "3"]})
    assert fitted.names_C == (("3", "b", "a"),)
    given = ["3", 3.0, "3.0", "b", b"a", "new", "NA", None, "", np.nan]
    codes = fitted.encode({"c": given})["categories"]
    # Among other names "3.0" is a separate name, for example of a version.
    assert codes[:, 0].tolist() == [2, 2, 0, 3, 4, 0, 0, 1, 1, 1]
    with pytest.raises(InvalidRecord, match="which is not a name") as caught:
        fitted.encode({"c": ["a", {"b": 1}]})
    assert caught.value.row == 1


def test_tokens_are_words_in_order_with_scikit_learns_idf():
    texts = {"t": ["The cat sat", "the Dog sat.", "the cat"], "u": ["a a", "", None]}
    fitted = Texts(("t", "u"), max_tokens=8).fit(texts)
    tokens_NL = fitted.encode(texts)["tokens"]
    words = {fitted._tokenizer.id_to_token(i): i + 1 for i in range(fitted.size - 1)}
    the, cat, sat, unknown, between = (words[w] for w in ("the", "cat", "sat", "[UNK]", "[SEP]"))
    assert tokens_NL[0].tolist()[:6] == [the, cat, sat, between, words["a"], words["a"]]
    assert tokens_NL[1].tolist() == [the, unknown, sat, unknown, between, 0]
    counts_NV = np.array([np.bincount(row, minlength=fitted.size) for row in tokens_NL])
    expected = TfidfTransformer().fit(counts_NV).idf_
    np.testing.assert_allclose(fitted.idf_V, expected, atol=1e-4)


def test_long_texts_are_cut_and_invalid_utf8_is_refused():
    fitted = Texts(("t",), max_tokens=3).fit({"t": ["a b c d e", "a b c d e"]})
    assert (fitted.encode({"t": ["a b c d e"]})["tokens"] > 0).sum() == 3
    assert fitted.encode({"t": ["a"]})["tokens"].shape == (1, 1)
    assert fitted.count_long(fitted.encode({"t": ["a", "a b c d", "a b c", "a b"]})["tokens"]) == 2
    assert fitted.count_long(fitted.encode({"t": ["a", "a b"]})["tokens"]) == 0
    for nothing in ("", " ", None):
        assert fitted.encode({"t": [nothing]})["tokens"].tolist() == [[0]], "one position"
    with pytest.raises(InvalidRecord, match="not UTF-8") as caught:
        fitted.encode({"t": ["a", "é".encode("latin-1")]})
    assert caught.value.row == 1
    with pytest.raises(InvalidRecord, match="is not text"):
        fitted.encode({"t": [7]})


def test_the_error_names_a_missing_field():
    with pytest.raises(InvalidRecord, match="field 'b' is missing; expected a, b"):
        to_columns([{"a": 1, "b": 2}, {"a": 1, "B": 2}], ["a", "b"])


def test_a_mixed_task_survives_json_and_encodes_the_same(rng):
    kinds = {
        name: {"kind": kind}
        for name, kind in (
            ("n", "number"),
            ("b", "boolean"),
            ("d", "date"),
            ("c", "category"),
            ("t", "text"),
            ("i", "image"),
        )
    }
    records = {
        "n": [1, 2, None],
        "b": [True, None, False],
        "d": ["2024-01-01", None, "2024-05-01"],
        "c": ["x", "y", "x"],
        "t": ["some words here", "some words", None],
        "i": [rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), None, None],
    }
    task = fitted(Task.of(kinds, "y", "regression"), records, [1, 2, 3])
    again = Task.from_dict(task.to_dict())
    assert again == task
    one, other = task.features.encode(records), again.features.encode(records)
    assert list(one) == ["numbers", "categories", "tokens", "i"]
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    assert not one["i"][1].any(), "a missing image among other fields is black"
    for row in range(3):
        single = task.features.encode(
            {name: values[row : row + 1] for name, values in records.items()}
        )
        for name, array in one.items():
            whole = array[row]
            if name == "tokens":  # alone, a text is not padded
                whole = whole[: single[name].shape[1]]
                assert not array[row][len(whole) :].any()
            np.testing.assert_array_equal(single[name][0], whole)


def test_metrics_of_decoded_values_match_scikit_learn(rng):
    values = rng.normal(50, 20, 200)
    target = ValueTarget("y").fit(values)
    targets = target.encode(values)
    np.testing.assert_allclose([targets.mean(), targets.std()], [0, 1], atol=1e-5)
    outputs = {"logits": (targets + rng.normal(0, 0.3, 200))[:, None].astype(np.float32)}
    predicted = target.decode(outputs)["value"]
    metrics = target.metrics(outputs, targets)
    assert metrics["r2"] == pytest.approx(sklearn.metrics.r2_score(values, predicted), rel=1e-4)
    expected = sklearn.metrics.root_mean_squared_error(values, predicted)
    assert metrics["rmse"] == pytest.approx(expected, rel=1e-4)
    expected = sklearn.metrics.mean_absolute_error(values, predicted)
    assert metrics["mae"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [None, "high", float("inf")])
def test_a_target_that_is_not_a_finite_number_is_refused(value):
    with pytest.raises(InvalidRecord, match="expected a finite number") as caught:
        ValueTarget("y").fit([1, 2, value])
    assert caught.value.row == 2


@pytest.mark.filterwarnings("error")
def test_a_few_absurd_targets_do_not_move_the_scale(rng):
    values = rng.normal(50, 20, 500)
    absurd = np.concatenate([values, [-3.4e38] * 5])
    target = ValueTarget("y").fit(absurd)
    assert target.scale < 100
    assert abs(target.mean - 50) < 20
    assert np.isfinite(target.encode([*absurd, 1.7e308])).all()
    task = Task(Features.of({"x": {"kind": "number"}}).fit({"x": values}), target)
    assert fit_notes(task, {"x": values, "y": values}) == []
    *_, note = fit_notes(task, {"x": absurd, "y": absurd})
    assert note.startswith("target 'y': 5 values (1.0%) are -3.4e+38, far from all others")


def test_a_target_with_a_single_value_is_refused():
    with pytest.raises(InvalidRecord, match="at least two values"):
        ValueTarget("y").fit([2, 2.0])


def test_multiple_labels_are_parsed_and_scored_as_by_sklearn(rng):
    target = LabelsTarget("y").fit([["a", "b"], "c|a", '["b"]', None, []])
    assert target.classes == ("a", "b", "c")
    assert target.counts == (2, 2, 1)
    true = rng.integers(0, 2, (60, 3)).astype(np.float32)
    given = [[name for name, there in zip("abc", row, strict=True) if there] for row in true]
    np.testing.assert_array_equal(target.encode(given), true)
    logits = rng.normal(size=(60, 3)).astype(np.float32)
    decoded = target.decode({"logits": logits})
    chosen = decoded["probabilities"] >= 0.5
    assert decoded["label"][0] == "|".join(np.array(["a", "b", "c"])[chosen[0]])
    metrics = target.metrics({"logits": logits}, true)
    assert metrics["f1"] == pytest.approx(sklearn.metrics.f1_score(true, chosen, average="micro"))
    assert metrics["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, chosen))
    with pytest.raises(InvalidRecord, match="'d', which is not among"):
        target.encode([["d"]])


def test_a_column_named_like_a_model_input_is_refused():
    with pytest.raises(ValueError, match="cannot be called 'tokens'"):
        Features.of({"tokens": {"kind": "image"}})


def test_a_custom_kind_that_is_not_allowed_is_refused():
    with pytest.raises(ValueError, match=r"not allowed to import no\.such:Thing"):
        Features.of({"a": {"kind": "no.such:Thing"}})


def test_a_given_tokenizer_is_used_unchanged(tmp_path):
    from train.tasks.columns.text import _trained

    file = tmp_path / "tokenizer.json"
    file.write_text(_trained(["alpha beta alpha beta"], 100).to_str())
    config = make_config(
        features={"t": "text"}, target="y", text={"tokenizer": str(file), "max_tokens": 4}
    )
    task = fitted(define_task(config), {"t": ["gamma gamma", "alpha"]}, ["a", "b"])
    tokens = task.features.encode({"t": ["alpha beta gamma"]})["tokens"][0]
    assert tokens.tolist() == [3, 4, 1]
    missing = make_config(features={"t": "text"}, target="y", text={"tokenizer": "no.json"})
    with pytest.raises(UserError, match=r"no\.json' cannot be read"):
        define_task(missing)
