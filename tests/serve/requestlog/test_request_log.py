"""The request log: values are read back as sent, its size is bounded, disk errors do no harm."""

import asyncio
import contextlib
import io
import logging
import math
import os
import subprocess
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.errors import UserError
from serve.config import LogOptions
from serve.requestlog import reader, writer
from serve.requestlog.files import YOUNG_S, list_files, log_folder
from serve.requestlog.schema import MAX_ROWS, buffer_entry, to_table
from serve.requestlog.values import KEY_VARIABLE, _key
from serve.requestlog.writer import FeedbackLog, LogEntry, RequestLog
from serve.telemetry.metrics import exposition, merge_samples
from tests.serving import client_of, make_rest
from tests.train.tasks.test_tasks import image_bytes
from train.tasks import TensorSpec
from train.tasks.columns.lists import LabelSet, Vector
from train.tasks.columns.scalars import Number

NOW_S = 1_800_000_000.0
AGE = TensorSpec("age", "FP64", ())
NAME = TensorSpec("name", "BYTES", ())
ALONE = TensorSpec("alone", "BOOL", ())
PHOTO = TensorSpec("photo", "UINT8", (6, 5, 3))
LABELS = {
    "label": np.array(["no", "yes"], object),
    "probabilities": np.array([[0.75, 0.25], [0.125, 0.875]], np.float32),
}


def entry(request_id="a", *, fields=(AGE,), columns=None, predictions=None, **changes):
    columns = {"age": [37.0, None]} if columns is None else columns
    known = {"version": "3", "variant": "int8", "time_s": NOW_S, "latency_s": 0.0125}
    return LogEntry(
        request_id,
        **{**known, **changes},
        columns=columns,
        predictions=LABELS if predictions is None else predictions,
        fields=fields,
    )


def one(request_id, value=1.0, **changes):
    """Return an entry with one row and one number."""
    return entry(
        request_id,
        columns={"age": np.array([value])},
        predictions={"value": np.array([value], np.float32)},
        **changes,
    )


def make(root, *, clock=lambda: NOW_S, **options):
    options = LogOptions(**{"sample_rate": 1, "flush_s": 0.02, **options})
    return RequestLog(str(root), "m", options, clock=clock)


def make_feedback(root, clock=lambda: NOW_S):
    return FeedbackLog(str(root), "m", LogOptions(flush_s=0.02), clock=clock)


def write(root, *entries, **options):
    """Log entries and close the log; return its counts."""

    async def scenario():
        log = make(root, **options)
        for each in entries:
            log.add(each)
        await log.close()
        return counts(log)

    return asyncio.run(scenario())


def give(root, *truths, clock=lambda: NOW_S):
    async def scenario():
        log = make_feedback(root, clock)
        for truth in truths:
            log.add(*truth)
        await log.close()

    asyncio.run(scenario())


def counts(log):
    """Return a log's metrics: {"rows", "bytes", and the number of dropped rows by reason}."""
    snapshot = log.snapshot({"model": "m"})
    (rows,), (size,) = snapshot["log_rows"][2], snapshot["log_bytes"][2]
    dropped = {labels["reason"]: value for _, labels, value in snapshot["log_dropped"][2]}
    return {"rows": rows[2], "bytes": size[2], **dropped}


async def until(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        await asyncio.sleep(0.005)


def files(root, kind="requests"):
    return list_files(log_folder(str(root), kind, "m"))


def test_rows_of_a_table_are_read_back_as_sent(tmp_path):
    columns = {
        "age": np.array([37.5, math.nan]),
        "name": np.array([b"Zo\xc3\xab", None], object),
        "alone": [True, None],
    }
    assert write(tmp_path, entry(fields=(AGE, NAME, ALONE), columns=columns))["rows"] == 2
    found = reader.read_requests(str(tmp_path), "m").to_pylist()
    assert [line.pop("time").timestamp() for line in found] == [NOW_S, NOW_S]
    same = {"id": "a", "version": "3", "variant": "int8", "latency_ms": 12.5}
    assert found == [
        {
            **same,
            "row": 0,
            "prediction": "no",
            "confidence": 0.75,
            "record": {"age": 37.5, "name": "Zoë", "alone": True},
        },
        {
            **same,
            "row": 1,
            "prediction": "yes",
            "confidence": 0.875,
            "record": {"age": None, "name": None, "alone": None},
        },
    ]


def test_an_image_is_logged_as_its_pixels_or_its_file(tmp_path, rng):
    pixels_NHWC = rng.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    jpeg = image_bytes(pixels_NHWC[0], "JPEG")
    sent = [
        entry("pixels", fields=(PHOTO,), columns={"photo": pixels_NHWC}),
        entry("files", fields=(PHOTO,), columns={"photo": np.array([jpeg, None], object)}),
    ]
    write(tmp_path, *sent)
    found = reader.read_requests(str(tmp_path), "m").to_pylist()
    for row, pixels in enumerate(pixels_NHWC):
        file = found[row]["record"]["photo"]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), pixels)
    assert [line["record"]["photo"] for line in found[2:]] == [jpeg, None]


def test_grey_images_texts_vectors_and_values_are_read_back(tmp_path, rng):
    grey = TensorSpec("photo", "UINT8", (4, 4, 1))
    curve = TensorSpec("curve", "FP32", (3,))
    columns = {
        "photo": rng.integers(0, 256, (2, 4, 4, 1), dtype=np.uint8),
        "name": ["a longer text\nof two lines", ""],
        "curve": np.arange(6, dtype=np.float32).reshape(2, 3),
    }
    values = {"value": np.array([1.5, -2.0], np.float32)}
    write(tmp_path, entry(fields=(grey, NAME, curve), columns=columns, predictions=values))
    found = reader.read_requests(str(tmp_path), "m").to_pylist()
    for row, line in enumerate(found):
        image = np.asarray(Image.open(io.BytesIO(line["record"]["photo"])))
        np.testing.assert_array_equal(image, columns["photo"][row, :, :, 0])
        assert line["record"]["curve"] == columns["curve"][row].tolist()
    assert [line["record"]["name"] for line in found] == ["a longer text\nof two lines", None]
    assert [(line["prediction"], line["confidence"]) for line in found] == [
        (1.5, None),
        (-2.0, None),
    ]


def test_numbers_in_any_form_are_logged_in_one_column(tmp_path):
    for values in ([" 37 ", "NA"], np.array([37, 1]), [37, None], np.array([b"37", None], object)):
        write(tmp_path, entry(columns={"age": values}))
    table = reader.read_requests(str(tmp_path), "m")
    assert table.schema.field("record").type.field("age").type == pa.float64()
    assert sorted(line["record"]["age"] or 0 for line in table.to_pylist()) == [
        *(0, 0, 0, 1),
        *(37, 37, 37, 37),
    ]


def test_64_rows_of_a_large_request_keep_their_numbers(tmp_path):
    count = 1000
    values_N = np.arange(count, dtype=float)
    write(tmp_path, entry(columns={"age": values_N}, predictions={"value": values_N}))
    found = reader.read_requests(str(tmp_path), "m").to_pylist()
    assert len(found) == MAX_ROWS
    assert all(line["row"] == line["record"]["age"] == line["prediction"] for line in found)
    assert found[-1]["row"] > count * 0.9


def test_a_buffered_entry_does_not_hold_the_requests_body():
    body = np.zeros(10_000_000, np.uint8)
    pixels_NHWC = body[:90].reshape(1, 6, 5, 3)
    kept = buffer_entry(entry(fields=(PHOTO,), columns={"photo": pixels_NHWC}), frozenset())
    assert kept.columns["photo"].base is None or kept.columns["photo"].base.nbytes < 1000
    assert kept.size_bytes < 10_000


def test_replicas_log_the_same_binomial_sample_of_requests(tmp_path):
    count, share = 20_000, 0.1
    ids = [f"5f3a-{number:x}" for number in range(count)]
    one_log, other = make(tmp_path, sample_rate=share), make(tmp_path, sample_rate=share)
    chosen = [one_log.wants(request_id) for request_id in ids]
    assert chosen == [other.wants(request_id) for request_id in ids]
    deviation = math.sqrt(count * share * (1 - share))
    assert abs(sum(chosen) - count * share) < 4 * deviation
    more, none, every = (make(tmp_path, sample_rate=share) for share in (0.2, 0, 1))
    assert all(more.wants(each) for each, taken in zip(ids, chosen, strict=True) if taken)
    assert not any(none.wants(request_id) for request_id in ids)
    assert all(every.wants(request_id) for request_id in ids)


@pytest.mark.parametrize("option", ["exclude_fields", "hash_fields"])
def test_a_log_option_with_an_unknown_field_is_refused(option):
    with pytest.raises(UserError, match=rf"log.{option}=salary: .*they have age"):
        writer.check_log_fields(LogOptions(**{option: ("salary",)}), "m", ["age"])


def test_excluded_and_hashed_fields_are_never_on_disk(tmp_path, monkeypatch, rng):
    monkeypatch.setenv(KEY_VARIABLE, "a key")
    _key.cache_clear()
    pixels_NHWC = rng.integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    jpeg = image_bytes(pixels_NHWC[0], "JPEG")
    secret, passport = "zanzibar-blue", "P1234567"
    text = TensorSpec("passport", "BYTES", ())
    sent = entry(
        fields=(NAME, text, PHOTO, AGE),
        columns={
            "name": [secret, secret],
            "passport": np.array([passport.encode(), None], object),
            "photo": [jpeg, None],
            "age": [424242.0, 424242.0],
        },
    )
    write(tmp_path, sent, exclude_fields=("name",), hash_fields=("passport", "photo", "age"))
    # Search the decoded rows too, because compression could hide a value in the files.
    content = repr(reader.read_requests(str(tmp_path), "m").to_pylist()).encode()
    content += b"".join(Path(file.path).read_bytes() for file in files(tmp_path))
    for hidden in (secret.encode(), passport.encode(), b"424242", jpeg[:16]):
        assert hidden not in content
    first, second = (
        line["record"] for line in reader.read_requests(str(tmp_path), "m").to_pylist()
    )
    assert "name" not in first
    assert len(first["passport"]) == 64
    assert second["passport"] is None
    assert first["age"] == second["age"]


def test_equal_values_have_equal_digests_with_one_key_only(tmp_path, monkeypatch):
    digests = []
    for key in ("one", "one", "other"):
        monkeypatch.setenv(KEY_VARIABLE, key)
        _key.cache_clear()
        root = tmp_path / str(len(digests))
        write(root, entry(columns={"age": [37, "37.0"]}), hash_fields=("age",))
        found = reader.read_requests(str(root), "m").to_pylist()
        digests.append([line["record"]["age"] for line in found])
    assert digests[0][0] == digests[0][1]
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]


def test_a_row_is_logged_even_if_all_its_fields_are_excluded(tmp_path):
    assert write(tmp_path, entry(), exclude_fields=("age",))["rows"] == 2
    assert "record" not in reader.read_requests(str(tmp_path), "m").column_names


def test_a_file_that_grows_by_few_rows_is_always_complete(tmp_path):
    async def scenario():
        log = make(tmp_path)
        for number in range(5):
            log.add(one(f"r{number}"))
            await until(lambda rows=number + 1: counts(log)["rows"] == rows)
            assert reader.read_requests(str(tmp_path), "m").num_rows == number + 1
        await log.close()

    asyncio.run(scenario())
    assert len(files(tmp_path)) == 1


def test_a_new_file_follows_a_full_or_hour_old_one(tmp_path):
    clock = {"now": NOW_S}

    async def scenario():
        log = make(tmp_path, file_rows=3, flush_s=3600, clock=lambda: clock["now"])
        for number in range(6):
            log.add(one(f"r{number}"))
            # A full file is written at once, whatever flush_s is.
            await until(lambda rows=3 * ((number + 1) // 3): counts(log)["rows"] == rows)
        clock["now"] += YOUNG_S
        log.add(one("last"))
        await log.close()

    asyncio.run(scenario())
    assert len(files(tmp_path)) == 3


def fill(root, days, **options):
    """Write a file with one row on each of the days, which count from NOW_S."""
    for day in days:
        moment = NOW_S + day * 86_400
        write(root, one(f"day{day}"), clock=lambda moment=moment: moment, **options)


def ids(root):
    return [line["id"] for line in reader.read_requests(str(root), "m").to_pylist()]


def test_files_older_than_the_retention_are_deleted(tmp_path):
    fill(tmp_path, range(6), retention_days=2.5)
    assert ids(tmp_path) == ["day3", "day4", "day5"]


def test_the_oldest_files_of_requests_and_feedback_are_deleted(tmp_path):
    fill(tmp_path, [0])
    size = files(tmp_path)[0].size_bytes
    give(tmp_path, ("day0", 0, 1.0), clock=lambda: NOW_S + 1)
    feedback_bytes = files(tmp_path, "feedback")[0].size_bytes
    fill(tmp_path, [1, 2], max_bytes=2 * size + feedback_bytes + 50)
    assert ids(tmp_path) == ["day1", "day2"]
    assert len(files(tmp_path, "feedback")) == 1
    fill(tmp_path, [3], max_bytes=2 * size + 50)
    assert ids(tmp_path) == ["day2", "day3"]
    assert not files(tmp_path, "feedback")


def test_files_of_a_killed_writer_are_deleted_after_a_day(tmp_path):
    fill(tmp_path, [0])
    left = f"{files(tmp_path)[0].path}.part-0badcafe"
    with open(left, "wb") as file:
        file.write(b"half a fi")
    assert ids(tmp_path) == ["day0"]
    fill(tmp_path, [0.5])
    assert os.path.exists(left)
    fill(tmp_path, [1.5])
    assert not os.path.exists(left)


def test_a_damaged_file_is_reported_and_skipped(tmp_path, caplog):
    fill(tmp_path, [0, 1])
    with open(files(tmp_path)[0].path, "r+b") as file:
        file.truncate(20)
    assert ids(tmp_path) == ["day1"]
    assert "is skipped" in caplog.text


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_counted_and_reported_once(tmp_path, caplog, rng):
    disk = tmp_path / "disk"
    caplog.set_level(logging.WARNING, logger="serve.requestlog.writer")
    noise = [rng.integers(0, 256, (1, 60, 50, 3), dtype=np.uint8) for _ in range(40)]
    photo = TensorSpec("photo", "UINT8", (60, 50, 3))

    async def scenario():
        log = make(disk, max_bytes=10**9)
        for sent, pixels in enumerate(noise, 1):
            prediction = {"value": np.zeros(1, np.float32)}
            columns = {"photo": pixels}
            log.add(entry("x", fields=(photo,), columns=columns, predictions=prediction))
            await until(lambda all=sent: counts(log)["rows"] + counts(log)["disk"] == all)
        full = counts(log)
        assert full["disk"] > 10
        assert full["rows"] == reader.read_requests(str(disk), "m").num_rows > 0
        for file in files(disk):
            os.remove(file.path)
        log.add(one("later"))
        await until(lambda: counts(log)["rows"] == full["rows"] + 1)
        await log.close()
        return full

    with small_disk(disk, "64k"):
        full = asyncio.run(scenario())
        assert "later" in ids(disk)
        assert not [file for file in files(disk) if ".part-" in file.name]
    words = [record.getMessage() for record in caplog.records]
    assert len(words) == 2
    assert "No space left" in words[0]
    assert f"{full['disk']:g} rows were lost" in words[1]


def test_a_folder_that_cannot_be_written_fails_no_request(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = write(tmp_path / "file", one("a"), one("b"))
    assert (found["disk"], found["rows"]) == (2, 0)
    assert len(caplog.records) == 1


def test_memory_is_bounded_when_the_storage_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_MEMORY_BYTES", 10_000)
    monkeypatch.setattr(writer, "CLOSE_S", 0.05)
    hold = threading.Event()

    async def scenario():
        log = make(tmp_path, file_rows=1)
        # Block the writing thread, as a file system that hangs would.
        held = log._log._thread.submit(hold.wait)
        for number in range(1000):
            log.add(one(f"r{number}"))
        memory = counts(log)["memory"]
        assert 900 < memory < 1000
        await log.close()
        hold.set()
        held.result(timeout=10)
        return counts(log), memory

    found, memory = asyncio.run(scenario())
    assert found["memory"] == memory


def test_a_request_that_cannot_be_written_costs_no_other(tmp_path):
    wrong = entry("wrong", fields=(PHOTO,), columns={"photo": [b"no image", b"none"]})
    found = write(tmp_path, one("a"), wrong, one("b"))
    assert (found["rows"], found["error"], found["disk"]) == (2, 2, 0)
    assert ids(tmp_path) == ["a", "b"]


def test_an_invalid_entry_is_counted_and_raises_nothing(tmp_path):
    assert write(tmp_path, entry(predictions={}), one("a")) == {
        **write(tmp_path / "other", one("a")),
        "error": 1,
    }


def test_the_metrics_have_the_format_of_prometheus(tmp_path):
    log, feedback = make(tmp_path), make_feedback(tmp_path)
    words = exposition(
        merge_samples([each.snapshot({"model": "m"}) for each in (log, feedback)])
    ).decode()
    assert 'halyard_log_rows_total{log="requests",model="m"} 0.0' in words
    assert 'halyard_log_dropped_total{log="feedback",model="m",reason="disk"} 0.0' in words
    assert 'halyard_log_bytes{log="requests",model="m"} 0.0' in words


def test_metrics_of_a_replica_include_those_of_its_log(bundle, tmp_path):
    rest = make_rest(bundle, log={"sample_rate": 1}, storage=str(tmp_path))
    with client_of(rest) as client:
        client.portal.call(rest._handler.repository._tick)
        shown = exposition(rest._handler.snapshot("r1")).decode()
        assert 'halyard_log_rows_total{log="requests",model="digits",replica="r1"}' in shown
        client.portal.call(rest._handler.repository.close)


def test_storage_can_be_a_url():
    root = "memory://request-log"
    try:
        fill(root, [0, 1])
        give(root, ("day1", 0, 5.0))
        assert ids(root) == ["day0", "day1"]
        (found,) = reader.read_labelled(root, "m").to_pylist()
        assert (found["id"], found["truth"]) == ("day1", 5.0)
        fill(root, [40])
        assert ids(root) == ["day40"]
    finally:
        fsspec.filesystem("memory").rm("/request-log", recursive=True)


def test_an_earlier_request_is_found_with_all_its_rows(tmp_path):
    write(tmp_path, *[one(f"r{number}", number) for number in range(50)])
    write(tmp_path, entry("wanted", version="4"), clock=lambda: NOW_S + 1)
    write(tmp_path, one("after"), clock=lambda: NOW_S + 2)
    found = reader.find_request(str(tmp_path), "m", "wanted")
    assert [(each.row, each.version, each.prediction) for each in found] == [
        (0, "4", "no"),
        (1, "4", "yes"),
    ]
    assert found[0].time.timestamp() == NOW_S
    assert reader.find_request(str(tmp_path), "m", "r7")[0].prediction == 7.0
    assert reader.find_request(str(tmp_path), "m", "unknown") is None
    assert reader.find_request(str(tmp_path), "another", "unknown") is None


def test_the_last_feedback_of_a_row_wins(tmp_path):
    write(tmp_path, entry("a"), entry("b"))
    give(tmp_path, ("a", 0, "yes"), ("a", 0, "no"), ("a", 1, "no"), ("lost", 0, "no"))
    give(tmp_path, ("a", 1, "yes"), clock=lambda: NOW_S + 60)
    table = reader.read_labelled(str(tmp_path), "m")
    found = {(line["id"], line["row"]): line["truth"] for line in table.to_pylist()}
    assert found == {("a", 0): "no", ("a", 1): "yes"}
    assert table["record"].to_pylist() == [{"age": 37.0}, {"age": None}]
    assert reader.read_feedback(str(tmp_path), "m").num_rows == 5


@pytest.mark.parametrize("hours", [-1, 1])
def test_labels_are_joined_if_clocks_differ_by_an_hour(tmp_path, hours):
    write(tmp_path, *[one(f"r{number}", number) for number in range(20)])
    there_s = NOW_S + 3600 * hours
    others = [one(f"s{number}", number, time_s=there_s) for number in range(20)]
    write(tmp_path, *others, clock=lambda: there_s)
    names = [f"{letter}{number}" for letter in "rs" for number in range(20)]
    give(tmp_path, *[(name, 0, float(name[1:]) + 0.5) for name in names[::2]])
    give(
        tmp_path,
        *[(name, 0, float(name[1:]) + 0.5) for name in names[1::2]],
        clock=lambda: there_s,
    )
    found = reader.read_labelled(str(tmp_path), "m").to_pylist()
    assert sorted(line["id"] for line in found) == sorted(names)
    assert all(line["truth"] == line["record"]["age"] + 0.5 for line in found)


def test_without_any_feedback_or_requests_nothing_is_labelled(tmp_path):
    assert reader.read_labelled(str(tmp_path), "m").num_rows == 0
    write(tmp_path, entry())
    assert reader.read_labelled(str(tmp_path), "m").num_rows == 0


def test_versions_with_different_fields_are_read_together(tmp_path):
    write(
        tmp_path,
        entry("a"),
        entry("b", version="4", fields=(NAME,), columns={"name": ["z", ""]}),
        one("c", 2.5, version="5"),
    )
    write(tmp_path, entry("d"), hash_fields=("age",), clock=lambda: NOW_S + 1)
    found = {
        (line["id"], line["row"]): line
        for line in reader.read_requests(str(tmp_path), "m").to_pylist()
    }
    assert found["a", 0]["record"] == {"age": "37", "name": None}
    assert found["b", 0]["record"] == {"age": None, "name": "z"}
    assert found["c", 0]["prediction"] == "2.5"
    assert len(found["d", 0]["record"]["age"]) == 64


def test_values_are_logged_as_the_model_read_them():
    fields = (AGE, TensorSpec("tags", "BYTES", ()), TensorSpec("place", "FP64", (2,)))
    readers = {
        "age": Number("age", ",", "€", (-1.0,)),
        "tags": LabelSet("tags", ("a", "b"), ";"),
        "place": Vector("place", 2),
    }
    columns = {
        "age": ["1.234,5 €", "-1"],
        "tags": [["a", "b"], "b;a"],
        "place": ["[1, 2.5]", None],
    }
    kept = buffer_entry(entry(fields=fields, columns=columns, readers=readers), frozenset())
    records = to_table([kept], frozenset())["record"].to_pylist()
    assert records == [
        {"age": 1234.5, "tags": "a|b", "place": [1.0, 2.5]},
        {"age": -1.0, "tags": "b|a", "place": None},
    ]
