"""Values as people and programs write them: units, dates, times of day, lists as text.

Also files that are sorted, have mixed types or encodings, or text before the header.
"""

import datetime
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cluster.errors import UserError
from tests.train.tasks.test_pictures import saved
from train.config import validate_config
from train.data import dataset
from train.data.reading import sources
from train.data.reading.samples import sample_source
from train.data.schema import inference
from train.data.schema.columns import infer_column
from train.data.schema.styles import UNKNOWN_STYLE, FileStyle
from train.data.schema.target_type import infer_task_type
from train.tasks import Numbers
from train.tasks.columns.lists import LabelSet
from train.tasks.columns.scalars import Date, Number

COUNT = 400
DAY_S = 86_400


def inferred(values, style=UNKNOWN_STYLE):
    return infer_column("x", values, style=style)


def sampled(path):
    return sample_source(sources.find_source(str(path)), 10_000)


@pytest.mark.parametrize("form", ["{} kg", "{}km/h", "{} °C", "{} months", "{} m²", "{}ml", "{}°"])
def test_numbers_with_the_same_unit_are_read(form, rng):
    numbers = rng.integers(20, 200, COUNT) / 2
    values = [form.format(number) for number in numbers]
    found = inferred(values)
    assert (found.kind, found.options["unit"]) == ("number", form[2:].strip().removesuffix("s"))
    np.testing.assert_array_equal(Number("x").fit(values).read(values), numbers)
    assert infer_task_type(values)[0] == "regression"


@pytest.mark.parametrize("form", ["A{}", "room {}", "{}a{}"])
def test_letters_before_numbers_make_codes(form, rng):
    values = [form.format(*pair) for pair in rng.integers(1, 9, (COUNT, 2))]
    assert inferred(values).kind == "category"


def test_numbers_with_two_units_are_categories(rng):
    values = [f"{number} {unit}" for number in range(1, 9) for unit in ("kg", "lb")] * 10
    assert inferred(values).kind == "category"


@pytest.mark.parametrize("form", ["%H:%M", "%H:%M:%S", "%I:%M %p"])
def test_times_of_day_are_read(form, rng):
    midnight = datetime.datetime(1900, 1, 1)
    times = [midnight + datetime.timedelta(minutes=int(each)) for each in rng.integers(0, 1440, 99)]
    values = [each.strftime(form) for each in times]
    assert inferred(values).options == {"format": form}
    seconds_N = Date("x", form).read(values) % DAY_S
    np.testing.assert_array_equal(
        seconds_N, [each.hour * 3600 + each.minute * 60 for each in times]
    )


def test_ratios_are_not_times_of_day():
    assert inferred(["16:9", "4:3", "1:1"] * 20).kind == "category"


def test_parquet_times_are_read(tmp_path):
    times = [datetime.time(hour, 30) for hour in range(24)] * 5
    pa.parquet.write_table(pa.table({"at": times, "y": [0, 1] * 60}), tmp_path / "t.parquet")
    found = infer_column("at", sampled(tmp_path / "t.parquet")["at"])
    assert found.kind == "date"


@pytest.mark.parametrize("as_type", [str, int, np.int64])
def test_whole_numbers_that_are_dates_are_read(as_type, rng):
    first = datetime.date(2023, 11, 1)
    days = [first + datetime.timedelta(days=int(each)) for each in rng.integers(0, 500, COUNT)]
    values = [as_type(each.strftime("%Y%m%d")) for each in days]
    assert inferred(values).options == {"format": "%Y%m%d"}
    expected = [(each - datetime.date(1970, 1, 1)).days * DAY_S for each in days]
    np.testing.assert_array_equal(Date("x", "%Y%m%d").read(values), expected)


def test_whole_numbers_that_are_not_all_dates_stay_numbers(rng):
    amounts = np.round(rng.lognormal(17, 0.02, COUNT)).astype(int)
    assert inferred(amounts).kind == "number"
    assert inferred(20_000_000 + rng.integers(0, 99, COUNT) ** 2 * 100).kind == "number"


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_lists_written_as_text_are_sets(write):
    lists = [["red", "it's"], ["red"], [], ["dark blue"], ["red", "dark blue"]]
    values = [write(each) for each in lists] * 20
    assert inferred(values).kind == "set"
    task_type, _ = infer_task_type([value for value in values if value != "[]"])
    assert task_type == "multilabel"
    encoder = Numbers((LabelSet("x"),)).fit({"x": values})
    assert encoder.columns[0].labels == ("red", "dark blue", "it's")
    first_NK = encoder.columns[0].read(values[:4])
    np.testing.assert_array_equal(first_NK, [[1, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]])


def test_vectors_written_as_text_are_vectors(rng):
    values = [json.dumps(each.tolist()) for each in rng.normal(size=(50, 3))]
    assert inferred(values).kind == "vector"
    assert inferred([*values, "[1.0]"]).kind is None
    assert inferred([*values, "[oops"]).kind == "text"


def test_the_reason_names_a_value_that_is_not_a_number():
    found = inferred([str(number) for number in range(10)] * 9 + ["<5"])
    assert found.kind == "category"
    assert "all but 1 of 91 are numbers; '<5' is not one" in found.why


def test_ambiguous_thousands_separators_name_the_option():
    latitudes = ["52.102", "51.987"] * 20
    assert "decimal: ." in inferred(latitudes, FileStyle(",")).why
    assert "decimal" not in inferred(latitudes, FileStyle(".")).why


def test_the_report_notes_how_two_digit_years_are_read(tmp_path, rng):
    births = [f"15.03.{year:02}" for year in rng.integers(40, 100, COUNT)]
    assert inferred(births).options == {"format": "%d.%m.%y"}
    frame = pd.DataFrame({"born": births, "y": rng.integers(0, 2, COUNT)})
    frame.to_csv(tmp_path / "births.csv", index=False)
    config = validate_config(
        {"name": "x", "target": "y", "data": {"train": str(tmp_path / "births.csv")}}
    )
    data = dataset.prepare_dataset(inference.complete_config(config).config, str(tmp_path))
    (note,) = [each for each in data.summary["report"]["notes"] if "two-digit" in each]
    assert note.startswith("'born': two-digit years are read as 1969 to 2068")


def test_the_sample_of_a_sorted_file_includes_later_dates(tmp_path):
    """In the first 10,000 records of this log every day could be a month."""
    days = [f"{day:02}/01/2024" for day in range(1, 32) for _ in range(1_000)]
    pd.DataFrame({"day": days, "y": [0, 1] * 15_500}).to_csv(tmp_path / "log.csv", index=False)
    found = infer_column("day", sampled(tmp_path / "log.csv")["day"])
    assert found.options == {"format": "%d/%m/%Y"}


def test_a_target_with_a_name_for_each_record_is_refused():
    with pytest.raises(UserError, match="300 different values that are not numbers"):
        infer_task_type([f"order-{number}" for number in range(300)])


def test_column_types_that_differ_between_files_are_combined(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1, "y": 0}\n' * 30)
    (tmp_path / "b.jsonl").write_text('{"x": "one", "y": 1}\n' * 30)
    assert set(sampled(tmp_path)["x"]) == {"1", "one"}
    (tmp_path / "c.jsonl").write_text('{"x": [1, 2], "y": 1}\n' * 30)
    with pytest.raises(
        UserError, match="'x' is list<item: int64> in one file and has another type"
    ):
        sampled(tmp_path)


def test_json_lines_may_have_a_byte_order_mark_and_nan(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"x": 1.5}\n{"x": NaN}\n{"x": -Infinity}\n')
    x_N = np.array(sampled(path)["x"], float)
    np.testing.assert_array_equal(x_N, [1.5, np.nan, np.nan])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_a_byte_order_mark_sets_the_encoding(encoding, tmp_path):
    (tmp_path / "data.csv").write_bytes("größe;y\n5 €;1\n".encode(encoding))
    assert sampled(tmp_path / "data.csv") == {"größe": ["5 €"], "y": ["1"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x,y\n5 €,2\n".encode("cp1252"), "such as cp1252"),
        ("x,y\né,2\n".encode("latin-1"), "such as latin-1"),
        (b"# made on Monday\nx,y\n1,2\n", "Remove the lines before the header"),
        (b",,y\n0,0,2\n", "columns 1, 2 have no name in the header"),
    ],
)
def test_errors_explain_wrong_encodings_and_headers(content, message, tmp_path):
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        sampled(tmp_path / "data.csv")


def test_an_unrecognized_delimiter_names_the_option(tmp_path):
    (tmp_path / "data.csv").write_text("x y\n1 2\n" * 3)
    config = validate_config(
        {"name": "x", "target": "y", "data": {"train": str(tmp_path / "data.csv")}}
    )
    with pytest.raises(UserError, match=r"Give --data\.delimiter"):
        inference.check_source(config)


def test_duplicate_columns_next_to_a_struct_are_refused(tmp_path):
    columns = [pa.array([1, 2]), pa.array([3, 4]), pa.array([{"a": 1}, {"a": 2}])]
    pa.parquet.write_table(pa.table(columns, names=["x", "x", "s"]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="'x'"):
        sampled(tmp_path / "t.parquet")


def test_a_note_names_folders_above_the_classes(tmp_path, rng):
    for folder in ("a/left", "b/right"):
        (tmp_path / folder).mkdir(parents=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / folder / "0.png").write_bytes(saved(Image.fromarray(pixels)))
    (note,) = sources.find_source(str(tmp_path)).notes
    assert note.endswith("not read as classes: a, b")
    assert not sources.find_source(str(tmp_path / "a")).notes


def described(path, **columns):
    """Write a CSV file with a target `y` and return its completed config."""
    pd.DataFrame(columns).to_csv(path, index=False)
    return completed(path)


def completed(path):
    config = validate_config({"name": "x", "target": "y", "data": {"train": str(path)}})
    return inference.complete_config(config).config


def test_the_target_uses_the_decimal_mark_of_the_file(tmp_path):
    prices = [f"{number / 100:.2f}".replace(".", ",") for number in range(1000, 1400)]
    values = [885 + 7 * number for number in range(400)]
    target = [f"{each:,}".replace(",", ".") for each in values]
    path = tmp_path / "data.csv"
    config = described(path, preis=prices, y=target)
    data = dataset.prepare_dataset(config, str(tmp_path / "runs"))
    assert data.task.target.decimal == ","
    assert data.task.target.fit(target).mean == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    "values",
    [["967", "7.2K", "879"], ["46", "17a", "9"], ["76 kg", "0.48", "3"], ["5 kg", "5 lb", "6 kg"]],
)
def test_numbers_only_partly_with_a_unit_are_categories(values):
    found = inferred(values * 30)
    assert found.kind == "category"
    assert "numbers" in found.why or "lb" in values[1]


def test_singular_and_plural_are_the_same_unit():
    values = ["1 year", "2 years", "15 years", "1 year"]
    for unit in (None, "year", "years"):
        number = Number("x", unit=unit).fit(values)
        np.testing.assert_array_equal(number.read(values), [1, 2, 15, 1])


@pytest.mark.parametrize(
    ("column", "form"),
    [("sku", "{}EU"), ("id", "{}A"), ("zip", "{} AB"), ("postal_code", "{} 034")],
)
def test_columns_named_as_codes_are_codes_even_with_letters(column, form, rng):
    values = [form.format(number) for number in rng.integers(100, 160, COUNT)]
    assert infer_column(column, values).why == "codes, judging by the column's name"


def test_amounts_are_numbers_despite_a_code_like_name(rng):
    values = [f"${number:,}" for number in rng.integers(100, 9_000, COUNT)]
    assert infer_column("revenue_customer", values).kind == "number"


def test_ip_addresses_are_categories():
    values = [f"192.168.100.{last}" for last in range(118, 128)] * 20
    found = inferred(values)
    assert (found.kind, found.why) == ("category", "IP addresses")


def test_codes_with_points_do_not_set_the_decimal_mark(tmp_path):
    codes = [f"16.{middle}.148" for middle in range(100, 180)] * 5
    amounts = [f"{number * number:,}" for number in range(40, 440)]
    config = described(tmp_path / "data.csv", firmware=codes, amount=amounts, y=[0, 1] * 200)
    assert config.features["amount"].decimal in (None, ".")


@pytest.mark.parametrize("other", [["08:30"] * COUNT, ["NULL", *["27/10/2024"] * (COUNT - 1)]])
def test_other_values_do_not_hide_the_day_month_order(other, tmp_path):
    in_doubt = [f"{number % 12 + 1:02}/05/2024" for number in range(COUNT)]
    sure = [f"{number % 28 + 1:02}/10/2024" for number in range(COUNT)]
    times = [f"{number % 24:02}:30" for number in range(COUNT)]
    columns = {"ordered": in_doubt, "delivered": [other[0], *sure[1:]], "at": times}
    if ":" in other[0]:
        columns["delivered"] = sure
    config = described(tmp_path / "data.csv", **columns, y=[0, 1] * (COUNT // 2))
    assert config.features["ordered"].format == "%d/%m/%Y"


@pytest.mark.parametrize(
    "values",
    [
        ["1", "1,5", "2", "2,5", "k.A."],
        ["<0,5", "3,8", "8", "1,5"],
        ["500", "1,000", "2,500", "TBD"],
    ],
)
def test_decimal_commas_do_not_separate_labels(values):
    values = values * 3 + [str(number) for number in range(10)]
    assert inferred(values * 10).kind == "category"
    assert infer_task_type(values * 10)[0] == "classification"


@pytest.mark.parametrize("kind", [float, str])
def test_dates_as_digits_with_missing_values_are_read(kind):
    days = pd.date_range("2022-07-01", periods=60)
    values = [kind(float(day.strftime("%Y%m%d"))) for day in days] + [None]
    assert inferred(values).options == {"format": "%Y%m%d"}
    read_N = Date("x", "%Y%m%d").read(values)
    np.testing.assert_array_equal(read_N[:-1], days.astype("datetime64[s]").astype(int))


def test_dates_with_times_as_digits_are_read():
    moments = pd.date_range("1890-03-13 06:22:31", periods=50, freq="997D")
    values = [moment.strftime("%Y%m%d%H%M%S") for moment in moments]
    assert inferred(values).options == {"format": "%Y%m%d%H%M%S"}
    assert infer_column("case_id", values).kind != "date"


def test_the_reason_names_every_date_order_that_fits():
    found = inferred(["23/04/06", "23/05/07", "22/06/08"] * 20)
    assert "%y/%m/%d" in found.why
    assert "would also fit" in found.why


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_arrow_times_of_any_unit_are_read(unit, tmp_path):
    seconds_N = np.arange(0, 86_400, 3_601)
    kind = pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    column = pa.array(seconds_N * per_second).cast(
        pa.int32() if unit in ("s", "ms") else pa.int64()
    )
    pa.parquet.write_table(pa.table({"at": column.cast(kind)}), tmp_path / "t.parquet")
    values = sampled(tmp_path / "t.parquet")["at"]
    form = infer_column("at", values).options["format"]
    np.testing.assert_array_equal(Date("at", form).read(values) % DAY_S, seconds_N)
    assert Date("at", form).read(["08:53:53"])[0] % DAY_S == 8 * 3600 + 53 * 60 + 53


@pytest.mark.parametrize("values", [["5:16", "23:13"], ["N", "T"], ["t", "n"]])
def test_values_resembling_times_or_booleans_are_categories(values):
    assert inferred(values * 50).kind == "category"


@pytest.mark.parametrize("doses", [[5, 10, 100], [1, 2, 50], [0.002, 5, 100_000]])
def test_few_different_numbers_have_no_sentinels(doses):
    assert Number("x").fit(np.array(doses * 30)).missing == ()
    marked = Number("x").fit(np.array([1, 2, 3, 4, 5, -999] * 30))
    assert marked.missing == (-999,)


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_lists_as_text_are_sets_without_single_item_lists(write):
    values = [write(pair) for pair in (["red", "blue"], ["blue", "green"], ["red", "green"])] * 20
    assert inferred(values).kind == "set"
    assert infer_task_type(values)[0] == "multilabel"


def test_python_lists_as_text_are_parsed_with_escapes():
    column = LabelSet("x").fit([r"['a\n', None, nan, 'it\'s']", "[None]"])
    assert set(column.labels) == {"a", "it's"}


def test_seconds_since_1970_are_numbers():
    values = np.arange(1_700_000_000, 1_700_060_000, 60)
    assert infer_column("created_at", values).kind == "number"
    assert infer_column("x", values).kind is None


@pytest.mark.parametrize(
    "form",
    [
        *("%Y-%m-%d %H:%M:%S UTC", "%d/%b/%Y:%H:%M:%S +0000", "%d/%m/%Y %I:%M %p"),
        *("%b %d %Y %I:%M%p", "%m/%d/%y %H:%M", "%d-%m-%Y %H:%M", "%d.%m.%y %H:%M"),
    ],
)
def test_dates_of_databases_and_server_logs_are_read(form):
    moments = pd.date_range("2023-01-14 07:35", periods=60, freq="31h").floor("min")
    values = [moment.strftime(form) for moment in moments] + ["0000-00-00"]
    found = inferred(values)
    assert found.kind == "date"
    seconds_N = Date("x", found.options["format"]).read(values)
    np.testing.assert_array_equal(seconds_N[:-1], moments.astype("datetime64[s]").astype(int))


def test_a_struct_with_a_number_of_bytes_is_not_a_file(tmp_path):
    response = {"status": 200, "bytes": 512}
    pd.DataFrame({"response": [response] * 30}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text((json.dumps({"response": response}) + "\n") * 30)
    for name in ("t.parquet", "t.jsonl"):
        assert set(sampled(tmp_path / name)) == {"response.status", "response.bytes"}


def test_one_padded_number_does_not_make_codes():
    assert inferred([*map(str, range(1, 300)), "007"]).kind != "category"
    assert inferred([*map(str, range(1, 300)), "007"] * 2).kind == "number"
    assert inferred([f"{number:05}" for number in range(500, 900, 7)] * 20).kind == "category"


def test_a_column_without_a_name_is_judged_by_its_values():
    assert infer_column("", ["low", "mid", "high"] * 20).kind == "category"
    assert infer_column("Unnamed: 0", list(range(60))).kind is None


def test_the_error_for_utf16_without_a_mark_names_the_option(tmp_path):
    (tmp_path / "data.csv").write_bytes("x;y\n1;2\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"give --data\.encoding utf-16-le"):
        sampled(tmp_path / "data.csv")


def test_a_note_names_folders_not_read_as_columns(tmp_path):
    for region in ("region=eu", "region=us"):
        (tmp_path / region).mkdir()
        pd.DataFrame({"x": [1], "y": [2]}).to_csv(tmp_path / region / "x.csv", index=False)
    (note,) = sources.find_source(str(tmp_path)).notes
    assert note == "folder names are not read as columns: region=eu, region=us"


def test_a_note_counts_images_outside_class_folders(tmp_path, rng):
    (tmp_path / "cat").mkdir()
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for place in ("cat/0.png", "1.png"):
        (tmp_path / place).write_bytes(saved(Image.fromarray(pixels)))
    (note,) = sources.find_source(str(tmp_path)).notes
    assert note == f"1 images are outside the class folders; their class is '{tmp_path.name}'"


@pytest.mark.parametrize(
    "values",
    [
        np.logspace(17, 20, COUNT),
        [f"{number:.3e}" for number in np.logspace(17, 20, COUNT)],
        [int(number) for number in np.logspace(3, 17, COUNT)],
    ],
)
def test_amounts_beyond_exact_doubles_are_numbers(values):
    assert inferred(values).kind == "number"


def test_whole_numbers_of_any_length_keep_their_digits(tmp_path):
    ids = [20_000_000_000_000_000_000 + 7 * number for number in range(50)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"id": each}) + "\n" for each in ids))
    assert sampled(path)["id"] == [str(each) for each in ids]


def test_columns_with_points_are_read_despite_decimal_comma(tmp_path):
    path = tmp_path / "data.csv"
    rows = [f"{number / 100:.2f}".replace(".", ",") for number in range(100, 500)]
    points = [f"{number / 10:.1f}" for number in range(400)]
    pd.DataFrame({"v": rows, "w": points, "y": [0, 1] * 200}).to_csv(path, sep=";", index=False)
    config = validate_config(
        {"name": "x", "target": "y", "data": {"train": str(path), "decimal": ","}}
    )
    config = inference.complete_config(config).config
    assert (config.features["v"].decimal, config.features["w"].decimal) == (",", ".")
    dataset.prepare_dataset(config, str(tmp_path / "runs"))


def test_a_column_of_empty_lists_is_dropped():
    assert inferred([[], [], None]).kind is None
    assert inferred(["[]", "[]"]).kind is None


def test_the_reason_names_an_impossible_date():
    days = pd.date_range("2020-01-01", periods=60).strftime("%d/%m/%Y %H:%M:%S").tolist()
    assert "most are dates, but '31/02/2020' is not one" in inferred([*days, "31/02/2020"]).why


@pytest.mark.parametrize("form", ["%d-%m-%Y %H:%M:%S", "%d.%m.%y %H:%M:%S", "%d %b %Y %H:%M"])
def test_dates_with_times_in_several_forms_are_read(form):
    moments = pd.date_range("2023-01-14 07:35", periods=60, freq="31h")
    assert inferred(moments.strftime(form).tolist()).options == {"format": form}


def test_the_reason_notes_numbers_without_a_percent_sign():
    assert (
        "values without it are read as the same unit" in inferred(["15.5%", "0.15", "7%"] * 20).why
    )
    assert "without" not in inferred(["15.5%", "7%"] * 20).why


def test_two_folders_of_one_split_are_refused(tmp_path, rng):
    for folder in ("train/a", "train/b", "val/a", "valid/a"):
        (tmp_path / folder).mkdir(parents=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / folder / "0.png").write_bytes(saved(Image.fromarray(pixels)))
    config = validate_config({"name": "x", "data": {"train": str(tmp_path)}})
    with pytest.raises(UserError, match="'val' and 'valid' are the same split"):
        inference.complete_config(config)


def test_a_folder_with_images_of_its_own_is_a_class(tmp_path, rng):
    for place in ("a/1.png", "a/sub/2.png", "b/3.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / place).write_bytes(saved(Image.fromarray(pixels)))
    assert not sources.find_source(str(tmp_path)).notes


@pytest.mark.parametrize("name", ["data.jsonl", "images"])
def test_a_missing_target_is_reported_before_ray_starts(name, tmp_path, rng):
    if name == "images":
        (tmp_path / name / "cat").mkdir(parents=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / name / "cat" / "0.png").write_bytes(saved(Image.fromarray(pixels)))
    else:
        (tmp_path / name).write_text('{"x": 1, "label": 0}\n')
    config = validate_config(
        {"name": "x", "target": "labl", "data": {"train": str(tmp_path / name)}}
    )
    with pytest.raises(UserError, match="Did you mean 'label'"):
        inference.check_source(config)


def test_a_note_shows_different_unicode_forms(tmp_path):
    names = ["Caf\u00e9", "Cafe\u0301"] * 100
    config = described(tmp_path / "data.csv", place=names, other=["a", "b"] * 100, y=[0, 1] * 100)
    config = validate_config(
        config.model_dump(mode="json", exclude_unset=True)
        | {"features": {"place": {"kind": "category"}, "other": {"kind": "category"}}}
    )
    data = dataset.prepare_dataset(config, str(tmp_path / "runs"))
    assert any(r"Cafe\u0301" in note for note in data.summary["report"]["notes"])
