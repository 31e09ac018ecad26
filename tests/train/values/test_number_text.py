"""Parsing of numbers as people write them, formats of columns, sentinels and outliers."""

import math

import numpy as np
import pytest

from train.tasks import InvalidRecord, Numbers
from train.tasks.columns.numeric import FARTHEST
from train.tasks.columns.scalars import Number
from train.tasks.regression import ValueTarget
from train.values.number_text import NumberFormat, find_format
from train.values.sentinels import find_sentinels, robust_mean_scale


@pytest.mark.parametrize(
    ("text", "decimal", "value"),
    [
        ("1234.5", ".", 1234.5),
        ("1,234.50", ".", 1234.5),
        ("1.234,50", ",", 1234.5),
        ("1'234.50", ".", 1234.5),
        ("1 234,5", ",", 1234.5),
        ("1\u202f234\u202f567", ",", 1234567),
        ("3.753,75", ",", 3753.75),
        (" -12 ", ".", -12),
        ("\u22123,5", ",", -3.5),
        ("(1,234)", ".", -1234),
        ("5-", ".", -5),
        ("1e-3", ".", 0.001),
        ("1,23,456", ".", 123456),
        ("12,34,567.50", ".", 1234567.5),
        ("49,-", ",", 49),
        ("1.234,--", ",", 1234),
        ("5.\u2013", ".", 5),
        ("-5.-", ".", -5),
        (".5", ".", 0.5),
        ("inf", ".", math.inf),
    ],
)
def test_numbers_are_read_with_their_separators(text, decimal, value):
    assert NumberFormat(decimal).parse(text) == value


@pytest.mark.parametrize("text", ["$7,876.50", "7,876.50 $", "-$7,876.50", "$ -7,876.50"])
def test_a_currency_may_stand_on_either_side(text):
    assert abs(NumberFormat(unit="$").parse(text)) == 7876.5
    with pytest.raises(ValueError, match="the unit is"):
        NumberFormat(unit="€").parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "1_000",
        "1_11",
        "٣",
        "12,34",
        "1,2,345",
        "0,12,345",
        "0,123",
        "+49 957 12",
        "0x1F",
        "1.2.3",
        "--5",
    ],
)
def test_text_that_resembles_a_number_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the messages differ
        NumberFormat().parse(text)
    with pytest.raises(InvalidRecord, match=r"field 'x' is .*; expected a number"):
        Number("x", ".", "", ()).read([text])


@pytest.mark.parametrize(
    ("texts", "expected", "ambiguous"),
    [
        (["1,5", "2,25"], NumberFormat(","), False),
        (["3.753,75", "541,41"], NumberFormat(","), False),
        (["1,234", "12,345.5"], NumberFormat("."), False),
        (["1,234", "2,500"], NumberFormat("."), True),
        (["1.234", "0.5"], NumberFormat("."), False),
        (["54%", "3 %"], NumberFormat(unit="%"), False),
        (["$5", "€5"], None, False),
        (["1_11", "11_1"], None, False),
        (["NA", "", "7"], NumberFormat("."), False),
    ],
)
def test_the_format_is_found_from_the_whole_column(texts, expected, ambiguous):
    assert find_format(texts) == (expected, ambiguous)


def test_a_number_column_infers_its_decimal_mark():
    column = Number("x").fit(["1.234,5", None, "NA", " 7 "])
    np.testing.assert_array_equal(
        column.read(["2.000,5", 3, None, "NA"]), [2000.5, 3, np.nan, np.nan]
    )
    with pytest.raises(InvalidRecord, match=r"expected a number with a decimal comma\. Send 37,5"):
        column.read(["2,000.5"])
    target = ValueTarget("y").fit(["1,5", "2,5"])
    assert target.mean == 2
    assert ValueTarget.from_dict(target.to_dict()) == target


def test_sentinels_are_repeated_values_far_from_all_others(rng):
    usual = rng.normal(50, 10, 1000)
    for sentinel in (-999.0, 9999.0, -3.4028234663852886e38, 1e12, -2147483648.0, 123456.0):
        values_N = np.concatenate([usual, np.full(20, sentinel)])
        assert find_sentinels(values_N) == (sentinel,)
    assert find_sentinels(np.concatenate([usual, [-999.0]])) == ()
    assert find_sentinels(np.concatenate([usual, np.full(20, 99.0)])) == ()
    assert find_sentinels(rng.lognormal(0, 2, 5000).round()) == ()
    assert find_sentinels(rng.integers(0, 5, 500).astype(float)) == ()
    assert set(find_sentinels(np.concatenate([usual, [-999.0] * 9, [-99999.0] * 9]))) == {
        -999.0,
        -99999.0,
    }


def test_a_few_absurd_values_do_not_move_the_scale(rng):
    usual = rng.normal(50, 10, 1000)
    far = np.concatenate([usual, rng.uniform(-3e38, 3e38, 20)])
    mean, scale = robust_mean_scale(far)
    assert abs(mean - 50) < 15
    assert scale < 80
    assert robust_mean_scale(usual) == pytest.approx((usual.mean(), usual.std()))
    assert robust_mean_scale(np.full(5, 3.0)) == (3.0, 1.0)

    encoder = Numbers((Number("x"),)).fit({"x": far})
    encoded_N = encoder.encode({"x": far})["numbers"][:, 0]
    assert np.isfinite(encoded_N).all()
    assert len(np.unique(encoded_N[:1000])) > 990


def test_given_sentinels_apply_and_an_empty_list_disables_them(rng):
    values = [*rng.normal(50, 10, 100), *[-999.0] * 10]
    assert np.isnan(Number("x").fit(values).read(values)).sum() == 10
    assert not np.isnan(Number("x", missing=()).fit(values).read(values)).any()
    assert np.isnan(Number("x", missing=(values[0],)).fit(values).read(values)).sum() == 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.filterwarnings("error")
def test_numbers_near_the_largest_double_have_finite_statistics(sign):
    column = {"a": list(sign * np.array([1e300, 1.5e308, 1.7e308, 0.0]))}
    encoder = Numbers((Number("a", missing=()),)).fit(column)
    assert np.isfinite([*encoder.mean_F, *encoder.scale_F]).all()
    encoded_N = encoder.encode(column)["numbers"][:, 0]
    assert np.isfinite(encoded_N).all()
    assert sign * encoded_N[0] > sign * encoded_N[3]


@pytest.mark.filterwarnings("error")
def test_an_extreme_number_is_clipped_to_the_farthest_value():
    encoder = Numbers((Number("a", missing=()),)).fit({"a": [0.0, 1e-300, 2e-300]})
    assert encoder.encode({"a": [-1.7e308, 1.7e308]})["numbers"].tolist() == [
        [-FARTHEST],
        [FARTHEST],
    ]


@pytest.mark.parametrize("word", ["?", ".", "-", "<NA>", r"\N", "#DIV/0!", "N.A.", "(null)"])
def test_missing_value_marks_of_other_programs_are_read(word):
    found, _ = find_format(["1.5", word, "2.5"])
    assert found == NumberFormat()
    np.testing.assert_array_equal(Number("x", missing=()).read(["1.5", word]), [1.5, np.nan])
