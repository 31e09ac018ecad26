"""Metrics, access log and traces of a server, and its API keys."""

import asyncio
import hashlib
import json
import subprocess
import sys

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from cluster.errors import UserError
from serve.errors import RateLimited, Unauthorized
from serve.grpc.service import SERVICE, InferenceService, start_server
from serve.security import APIKey, KeyStore, TokenBucket
from serve.telemetry.access_log import AccessLog
from serve.telemetry.metrics import SECONDS, Histogram, VersionMetrics, exposition, merge_samples
from serve.telemetry.recorder import RequestRecorder
from serve.telemetry.tracing import Tracer
from tests.server import REPOSITORY
from tests.serving import make_host, make_rest


def test_a_histogram_counts_as_prometheus_does(rng):
    from prometheus_client import CollectorRegistry
    from prometheus_client import Histogram as Reference

    registry = CollectorRegistry()
    reference = Reference("x", "x", registry=registry, buckets=SECONDS)
    ours = Histogram(SECONDS)
    for value in [*rng.gamma(0.5, 0.1, 500), 0.005, 1, 100]:
        ours.observe(float(value))
        reference.observe(float(value))
    expected = {
        (sample.name.removeprefix("x"), sample.labels.get("le")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }
    got = {(suffix, labels.get("le")): value for suffix, labels, value in ours.samples({})}
    assert got == pytest.approx(expected)


def test_quantiles_are_interpolated_up_to_the_last_bound():
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.5, 1.5, 3, 100, 1000):
        histogram.observe(value)
    shares = (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1)
    assert [histogram.quantile(share) for share in shares] == [1, 1.5, 2, 4, 4, 4]


def test_metrics_of_replicas_are_exported_side_by_side():
    snapshots = []
    for replica in ("a", "b"):
        metrics = VersionMetrics()
        metrics.answered("v2", 200, 0.02)
        metrics.refused["queue_full"] += 2
        snapshots.append(metrics.snapshot({"model": "m", "replica": replica}, queue_rows=7))
    text = exposition(merge_samples(snapshots)).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {s.labels["replica"] for s in families["halyard_requests"].samples} == {"a", "b"}
    assert sum(s.value for s in families["halyard_refused"].samples) == 4
    assert [s.value for s in families["halyard_queue_rows"].samples] == [7, 7]
    totals = [
        sample.value
        for sample in families["halyard_request_seconds"].samples
        if sample.name.endswith("_count") and sample.labels["stage"] == "total"
    ]
    assert totals == [1, 1]


async def ask(rest, path, headers=()):
    """Send a GET request to an application; return the status."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": list(headers)}
    await rest(scope, receive, send)
    return sent[0]["status"]


async def written(path, lines):
    async with asyncio.timeout(10):
        while not path.exists() or path.read_text().count("\n") < lines:
            await asyncio.sleep(0.01)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_access_log_has_a_line_for_each_request(bundle, tmp_path):
    async def scenario():
        rest = make_rest(bundle, RequestRecorder(AccessLog(tmp_path / "a.jsonl", "all")))
        await ask(rest, "/v2/models/digits", [(b"x-request-id", b"r1"), (b"x-client-id", b"me")])
        await ask(rest, "/v2/models/other\nforged")
        first, second = await written(tmp_path / "a.jsonl", 2)
        assert first["id"] == "r1"
        assert first["client"] == "me"
        assert (first["model"], first["version"], first["status"]) == ("digits", "3", 200)
        assert second["status"] == 404
        assert first["ms"] > 0

    asyncio.run(scenario())


def test_the_access_log_can_have_errors_only(bundle, tmp_path):
    async def scenario():
        rest = make_rest(bundle, RequestRecorder(AccessLog(tmp_path / "a.jsonl", "errors")))
        await ask(rest, "/v2")
        await ask(rest, "/nowhere")
        assert [line["status"] for line in await written(tmp_path / "a.jsonl", 1)] == [404]

    asyncio.run(scenario())


def test_a_trace_continues_the_clients_trace(bundle):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter, "halyard")
    rest = make_rest(bundle, RequestRecorder(tracer=tracer))
    parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    asyncio.run(ask(rest, "/v2/models/digits", [(b"traceparent", parent)]))
    tracer.flush()
    (span,) = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes["halyard.model"] == "digits"
    assert span.attributes["http.response.status_code"] == 200
    assert span.end_time > span.start_time


def test_a_token_bucket_allows_its_rate_and_no_more():
    bucket = TokenBucket(rate=5)
    assert sum(bucket.take(100.0) == 0 for _ in range(20)) == 5
    assert bucket.take(100.0) == pytest.approx(0.2)
    taken = sum(bucket.take(100 + step / 100) == 0 for step in range(1, 401))
    assert taken == pytest.approx(20, abs=1)


def make_key(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "serve.security", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_key_is_shown_once_and_stored_as_a_hash(tmp_path):
    path = tmp_path / "keys.yaml"
    made = make_key("team", "--file", str(path), "--models", "digits", "--rate", "2")
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert secret not in path.read_text()
    keys = KeyStore.load(str(path))
    key = keys.check(f"Bearer {secret}", 0)
    assert (key.name, key.models, key.admin) == ("team", ["digits"], False)
    for wrong in (None, secret, "Bearer x", f"Bearer {secret}x", "Basic abc", "Bearer \udcff"):
        with pytest.raises(Unauthorized):
            keys.check(wrong, 0)
    keys.check(f"bearer {secret}", 0)
    with pytest.raises(RateLimited):
        keys.check(f"Bearer {secret}", 0)
    again = make_key("team", "--file", str(path))
    assert again.returncode == 2
    assert "already has a key 'team'" in again.stderr
    assert len(again.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", ["a: 1", "- name: x", "- [", "- name: x\n  sha256: zz"])
def test_a_wrong_keys_file_is_refused(tmp_path, content):
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="list of keys"):
        KeyStore.load(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        KeyStore.load(str(tmp_path / "none.yaml"))


def test_a_grpc_call_is_logged_and_traced_like_http(bundle, tmp_path):
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter, "halyard")
    message = service_pb2.ModelInferRequest(model_name="digits", id="mine")
    message.inputs.add(name="image", datatype="UINT8", shape=[3, 8, 8, 1])
    message.raw_input_contents.append(bytes(3 * 64))
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (("x-request-id", "r1"), ("x-client-id", "me"), ("traceparent", trace))
    secret = "k" * 32
    key = APIKey(name="team", sha256=hashlib.sha256(secret.encode()).hexdigest())

    async def scenario():
        recorder = RequestRecorder(AccessLog(tmp_path / "a.jsonl", "all"), tracer)
        handler = make_host(bundle, keys=KeyStore([key]))
        server, port = await start_server(
            InferenceService(handler, recorder), 0, max_message_bytes=2**20
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            sent = (*metadata, ("authorization", f"Bearer {secret}"))
            await call(message.SerializeToString(), metadata=sent, timeout=30)
            with pytest.raises(grpc.aio.AioRpcError):
                await call(message.SerializeToString(), metadata=metadata, timeout=30)
        await server.stop(0)
        return await written(tmp_path / "a.jsonl", 2)

    answered, refused = asyncio.run(scenario())
    assert (answered["id"], answered["method"], answered["path"]) == ("r1", "gRPC", "ModelInfer")
    assert (answered["model"], answered["version"], answered["rows"]) == ("digits", "3", 3)
    # The client's name is that of its key, whatever its x-client-id is.
    assert (answered["client"], answered["status"]) == ("team", 200)
    assert (refused["client"], refused["status"], refused["version"]) == ("me", 401, None)
    tracer.flush()
    span, _ = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert span.attributes["halyard.version"] == "3"
    assert span.attributes["halyard.rows"] == 3
