"""The load test's figures, compared with those of a server that counts its own requests."""

import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import CommandFailed, UserError
from serve.loadtest import (
    ClosedLoad,
    LoadTarget,
    LoadTestReport,
    PoissonLoad,
    build_request,
    find_rate,
    run_load,
)
from serve.loadtest.__main__ import main
from serve.loadtest.load import poisson_arrivals
from serve.loadtest.report import Outcome
from serve.loadtest.search import highest_rate
from serve.protocol import tensors
from tests.server import REPOSITORY

OK = (200, {}, b"{}")
BUSY = (503, {"Retry-After": "0"}, b"")
Reply = tuple[int, dict[str, str], bytes] | None


@contextmanager
def serving(answer: Callable[[int, str, bytes], Reply]) -> Iterator[str]:
    """Run a server; yield its URL.

    answer: returns status, headers and body for a request's number, path and body, or None to close
    the connection.
    """
    numbers = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = answer(next(numbers), self.path, body)
            if reply is None:
                self.close_connection = True
                return
            status, headers, content = reply
            given = {**headers, "Content-Length": str(len(content))}
            head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
            self.wfile.write(f"HTTP/1.1 {status} x\r\n{head}\r\n".encode() + content)

        do_POST = do_GET

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def at(url: str) -> LoadTarget:
    return LoadTarget(url, [build_request(url, "/")])


def test_outcomes_are_counted_separately():
    replies = [OK, BUSY, (429, {}, b""), (404, {}, b""), (500, {}, b""), None]
    given: Counter[int] = Counter()

    def answer(number: int, path: str, body: bytes) -> Reply:
        given[number % len(replies)] += 1
        return replies[number % len(replies)]

    with serving(answer) as url:
        report = run_load(at(url), ClosedLoad(1), warmup_s=0, duration_s=0.7)
    assert min(given.values()) >= 2
    assert report.ok == given[0] == len(report.latencies_ms)
    assert (report.shed, report.shed_with_retry_after) == (given[1] + given[2], given[1])
    assert report.shed_p99_ms is not None
    assert (report.client_errors, report.server_errors) == (given[3], given[4])
    assert report.connection_errors == given[5]
    assert report.requests == sum(given.values())
    assert report.retried == 0


def test_a_request_without_a_response_is_a_timeout():
    silent, over = itertools.count(), threading.Event()

    def answer(number: int, path: str, body: bytes) -> Reply:
        if number % 3 == 0:
            next(silent)
            over.wait()
        return OK

    with serving(answer) as url:
        report = run_load(at(url), ClosedLoad(2), warmup_s=0, duration_s=0.6, timeout_s=0.2)
        over.set()
    assert report.timeouts == next(silent) >= 2
    assert report.requests == report.ok + report.timeouts


def test_poisson_arrivals_have_the_rate_and_the_spread():
    times_N = poisson_arrivals(rate_per_s=200, seconds=100, seed=1)
    gaps_N = np.diff(times_N)
    assert abs(len(times_N) - 20_000) < 5 * 20_000**0.5
    assert np.std(gaps_N) == pytest.approx(np.mean(gaps_N), rel=0.05)
    assert times_N.tolist() == poisson_arrivals(200, 100, seed=1).tolist()
    assert len(poisson_arrivals(0.01, 1, seed=0)) == 0


def test_every_arrival_is_sent():
    with serving(lambda *_: OK) as url:
        report = run_load(at(url), PoissonLoad(200), warmup_s=0.3, duration_s=0.7, seed=2)
    times_N = poisson_arrivals(200, 1.0, seed=2)
    # An arrival within rounding of the end of the warm-up may be counted on either side.
    assert report.ok == report.requests == pytest.approx(np.sum(times_N >= 0.3), abs=1)
    assert report.send_lag_p99_ms is not None


def stall(number: int, lock: threading.Lock, seconds: float = 0.5) -> Reply:
    """Respond at once, but let request number 100 delay all others."""
    with lock:
        if number == 100:
            time.sleep(seconds)
    return OK


def test_latency_counts_from_when_a_request_was_due():
    lock = threading.Lock()
    with serving(lambda number, *_: stall(number, lock)) as url:
        report = run_load(at(url), PoissonLoad(200), warmup_s=0, duration_s=1.2)
        assert report.latency_ms is not None
        assert report.latency_ms["p99"] > 400
    # A closed loop sends nothing meanwhile, so the p99 misses the only slow response.
    with serving(lambda number, *_: stall(number, lock)) as url:
        report = run_load(at(url), ClosedLoad(1), warmup_s=0, duration_s=1)
        assert report.latency_ms is not None
        assert report.latency_ms["max"] > 400 > report.latency_ms["p99"]


def test_the_wait_for_a_connection_counts_as_latency():
    lock = threading.Lock()
    with serving(lambda number, *_: stall(100, lock, seconds=0.02)) as url:
        report = run_load(at(url), PoissonLoad(150, connections=1), warmup_s=0, duration_s=0.6)
    assert report.connections_opened == 1
    assert report.latency_ms is not None
    # The requests of 0.6 s take three times as long on one connection, each of them 0.02 s.
    assert report.latency_ms["max"] > 500


def test_the_warm_up_is_left_out():
    def answer(number: int, path: str, body: bytes) -> Reply:
        if number == 0:
            time.sleep(0.5)
        return OK

    with serving(answer) as url:
        report = run_load(at(url), ClosedLoad(1), warmup_s=0.6, duration_s=0.3)
    assert report.latency_ms is not None
    assert report.latency_ms["max"] < 500
    assert report.duration_s == 0.3


def test_latency_starts_at_due_time_throughput_at_responses():
    ok = Outcome.OK
    done = [
        (9.0, 9.5, ok, False, 0),  # in the warm-up
        (9.9, 10.5, ok, False, 0),  # due in it, answered after it
        (10.0, 10.1, ok, False, 0),
        (10.5, 11.2, ok, False, 1),
        (11.9, 13.0, ok, False, 0),  # answered after the end
        (12.0, 12.1, ok, False, 0),  # due after the end
        (11.0, 11.1, Outcome.SHED, True, 2),
    ]
    report = LoadTestReport.of(done, load="", start_s=10, duration_s=2)
    assert (report.requests, report.ok, report.shed_with_retry_after) == (4, 3, 1)
    assert (report.retried, report.failed_after_retries) == (2, 1)
    assert report.latencies_ms.tolist() == pytest.approx([100, 700, 1100])
    assert report.answered_s.tolist() == pytest.approx([0.1, 0.5, 1.2])
    assert report.ok_per_s == 1.5
    assert report.within(700.001) == 2
    assert not report.holds(2000)


def test_timeouts_count_as_at_least_their_limit():
    done = [(0.0, 0.049, Outcome.OK, False, 0)] * 990
    done += [(0.0, 10.0, Outcome.TIMEOUT, False, 0)] * 10
    report = LoadTestReport.of(done, load="", start_s=0, duration_s=1)
    assert report.latency_ms is not None
    assert report.latency_ms["p50"] == pytest.approx(49)
    assert report.latency_ms["p99.9"] == report.latency_ms["max"] == pytest.approx(10_000)
    assert (report.ok, report.within(50), report.within(60_000)) == (990, 990, 990)
    assert report.holds(50)
    more = [*done, (0.0, 10.0, Outcome.TIMEOUT, False, 0)]
    assert not LoadTestReport.of(more, load="", start_s=0, duration_s=1).holds(50)


@pytest.mark.parametrize("outcome", [o for o in Outcome if o != Outcome.OK])
def test_a_rate_holds_if_99_percent_of_requests_are_in_time(outcome):
    """The share is of all requests, not only of those with a response."""
    done = [(0.0, 0.001, Outcome.OK, False, 0)] * 980 + [(0.0, 0.001, outcome, False, 0)] * 20
    assert not LoadTestReport.of(done, load="", start_s=0, duration_s=1).holds(50)
    late = [(0.0, 0.001 if n >= 10 else 9.0, Outcome.OK, False, 0) for n in range(1000)]
    assert LoadTestReport.of(late, load="", start_s=0, duration_s=1).holds(50)
    assert not LoadTestReport.of(late[:999], load="", start_s=0, duration_s=1).holds(50)


def test_a_retry_is_given_up_after_its_time_limit():
    """The retry waits behind requests that were due later."""
    over = threading.Event()

    def answer(number: int, path: str, body: bytes) -> Reply:
        if number > 0:
            over.wait()
        return BUSY

    with serving(answer) as url:
        load = PoissonLoad(rate_per_s=40, connections=1)
        report = run_load(at(url), load, warmup_s=0, duration_s=1, timeout_s=0.4, retries=3)
        over.set()
    assert report.timeouts == report.requests > 10
    assert report.retried == 1
    assert report.latencies_ms.max() < 600


@pytest.mark.parametrize("first", [BUSY, None])
def test_a_refused_request_is_retried(first):
    with serving(lambda number, *_: OK if number % 2 else first) as url:
        report = run_load(at(url), ClosedLoad(1), warmup_s=0, duration_s=0.4, retries=1)
    assert report.ok == report.requests == report.retried > 1
    assert report.failed_after_retries == 0


def test_requests_that_fail_after_retries_are_counted():
    with serving(lambda *_: BUSY) as url:
        report = run_load(at(url), ClosedLoad(1), warmup_s=0, duration_s=0.4, retries=2)
    assert report.shed == report.requests == report.retried == report.failed_after_retries > 0


def test_the_load_test_waits_for_retry_after():
    later = (503, {"Retry-After": "1"}, b"")
    with serving(lambda number, *_: OK if number else later) as url:
        report = run_load(at(url), ClosedLoad(1), warmup_s=0, duration_s=0.1, retries=1)
    assert (report.ok, report.retried) == (1, 1)
    assert report.latencies_ms[0] >= 1000


@pytest.mark.parametrize("limit", [730.0, 42.0])
def test_the_found_rate_is_just_below_the_highest(limit):
    assert limit / 1.05 <= highest_rate(lambda rate: rate <= limit, start_per_s=100) <= limit


def test_the_found_rate_is_zero_if_no_rate_holds():
    assert highest_rate(lambda rate: False, start_per_s=100) == 0.0


def test_one_slow_step_does_not_end_the_search():
    slow = iter([True])

    def measure(rate_per_s: float) -> LoadTestReport:
        seconds = 0.2 if rate_per_s > 400 or next(slow, False) else 0.001
        done = [(0.0, seconds, Outcome.OK, False, 0)] * 100
        return LoadTestReport.of(done, load="", start_s=0, duration_s=1)

    search = find_rate(measure, bound_ms=50, start_per_s=100)
    assert search.rate_per_s == pytest.approx(390, abs=10)
    assert [step["held"] for step in search.steps[:2]] == [False, True]


INPUTS = [
    {"name": "photo", "datatype": "UINT8", "shape": [-1, 4, 5, 3]},
    {"name": "age", "datatype": "FP64", "shape": [-1]},
    {"name": "member", "datatype": "BOOL", "shape": [-1]},
    {"name": "town", "datatype": "BYTES", "shape": [-1]},
    {"name": "count", "datatype": "INT64", "shape": [-1, 2]},
]


def model_server(bodies: list[bytes]) -> Callable[[int, str, bytes], Reply]:
    pages = {"/v2/models": {"models": ["m"]}, "/v2/models/m": {"name": "m", "inputs": INPUTS}}

    def answer(number: int, path: str, body: bytes) -> Reply:
        if path == "/v2/models/m/infer":
            bodies.append(body)
            return OK
        known = path in pages
        return (200 if known else 404), {}, json.dumps(pages.get(path)).encode()

    return answer


def test_the_command_sends_random_rows_to_a_model(tmp_path, capsys):
    bodies: list[bytes] = []
    picture = tmp_path / "test.png"
    options = ["--rows", "2", "--connections", "2", "--warmup", "0", "--duration", "0.5"]
    with serving(model_server(bodies)) as url:
        result = main([url, *options, "--p99", "1000", "--picture", str(picture)])
    # One body more than requests: the probe.
    assert result["ok"] == result["requests"] == len(bodies) - 1
    assert result["within"]["ok"] == result["ok"]
    assert len(set(bodies)) == 64
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "p99.9" in capsys.readouterr().err
    head, end = json.JSONDecoder().raw_decode(bodies[0].decode(errors="replace"))
    for tensor, declared in zip(head["inputs"], INPUTS, strict=True):
        size = tensor.get("parameters", {}).get("binary_data_size")
        raw = memoryview(bodies[0])[end : end + size] if size else None
        name, array = tensors.decode(tensor, raw)
        assert name == declared["name"]
        assert array.shape == (2, *declared["shape"][1:])


def test_the_command_posts_files_in_turn_with_headers(tmp_path):
    bodies: set[bytes] = set()
    files = [tmp_path / "a,1", tmp_path / "b"]
    for file in files:
        file.write_bytes(file.name.encode())

    def answer(number: int, path: str, body: bytes) -> Reply:
        bodies.add(body)
        return OK if path == "/under/predict" else (404, {}, b"")

    with serving(answer) as url:
        options = ["--path", "/predict", "--header", "X: 1, 2", "--api-key", "k"]
        listed = [part for file in files for part in ("--body", str(file))]
        times = ["--warmup", "0", "--duration", "0.2", "--rate", "50"]
        result = main([f"{url}/under", *options, *listed, *times])
    assert bodies == {b"a,1", b"b"}
    assert result["ok"] == result["requests"]


def test_the_command_finds_a_rate():
    with serving(lambda *_: OK) as url:
        options = ["--path", "/", "--find-rate", "--p99", "0.000001", "--rate", "4"]
        result = main([url, *options, "--warmup", "0", "--duration", "0.1"])
    assert result["find_rate"]["goodput_per_s"] == 0.0
    assert len(result["find_rate"]["steps"]) == 6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["ftp://127.0.0.1"], "ftp"),
        (["http://127.0.0.1:port"], "port"),
        (["http://h", "--rate", "-1"], "--rate"),
        (["http://h", "--nonsense", "1"], "nonsense"),
        (["http://h", "--body"], "--body"),
        (["http://h", "--find-rate"], "--p99"),
        (["http://h", "--body", "x"], "--path"),
        (["http://h", "--path", "x"], "--path"),
        (["http://h", "--path", "/", "--body", "/no/such"], "/no/such"),
        (["http://h", "--path", "/", "--header", "x"], "--header"),
        (["http://h", "--path", "/", "--picture", "x.txt"], "x.txt"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(UserError, match=named) as error:
        main(options)
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_served_is_named():
    with serving(model_server([])) as url, pytest.raises(UserError, match="'other'"):
        main([url, "--model", "other"])


@pytest.mark.parametrize(("url", "code"), [("nonsense", 2), ("http://127.0.0.1:9", 1)])
def test_the_command_fails_in_one_line(url, code):
    done = subprocess.run(
        [sys.executable, "-m", "serve.loadtest", url],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_the_client_needs_neither_ray_nor_torch():
    code = "import sys; sys.modules['ray'] = sys.modules['torch'] = None; import serve.loadtest"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_an_unreachable_server_is_reported():
    with pytest.raises(CommandFailed, match="refused"):
        main(["http://127.0.0.1:9", "--path", "/"])


def test_a_server_that_goes_away_is_counted(tmp_path: Path):
    with serving(lambda *_: OK) as url:
        gone = at(url)
    report = run_load(gone, ClosedLoad(2), warmup_s=0, duration_s=0.3)
    assert report.connection_errors == report.requests > 2
    assert report.latency_ms is None
