"""The gateway of several models, in front of applications with one model each."""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.access import Guard
from serve.config import GatewayConfig, ServeConfig
from serve.control import autoscaling
from serve.http import model_gateway
from serve.http.routes import ModelAPI
from serve.inference.latency_model import LatencyModel
from tests.serve.http.test_routes import ZEROS, v2_body
from tests.serving import client_of, make_host


class Application:
    """A model's application, with the methods that the gateway calls."""

    def __init__(self, host):
        self.host, self.rest = host, ModelAPI(host)

    async def forward(self, *request):
        return await model_gateway.call_app(self.rest, *request)

    async def index(self):
        return await self.host.repository.index()

    async def metrics(self):
        return self.rest.snapshot("r1")


class Gone:
    async def index(self):
        raise RuntimeError("there is no such application")


def make_client(**models):
    config = GatewayConfig(
        models=list(models), limits={"max_body_bytes": 10_000, "body_timeout_s": 5}
    )
    find = models.__getitem__
    return client_of(model_gateway.ModelGateway(find, find, Guard(None, loopback=True), config))


@pytest.fixture
def client(bundle):
    with make_client(digits=Application(make_host(bundle)), gone=Gone()) as client:
        yield client


def test_the_gateway_forwards_requests_that_name_a_model(client):
    instances = {"instances": [ZEROS[0].tolist()]}
    answer = client.post("/v1/models/digits:predict", json=instances)
    assert answer.status_code == 200
    assert list(answer.json()) == ["predictions"]
    assert client.post("/v2/models/digits/infer", json=v2_body(ZEROS)).status_code == 200
    given = client.get("/v1/models/digits", headers={"X-Request-ID": "mine"})
    assert given.headers.get_list("x-request-id") == ["mine"]
    assert client.get("/v1/models/digits").json() == {"name": "digits", "ready": True}
    assert client.post("/v1/models/digits:predict", content=b"{").status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/ready", 503),
        ("GET", "/docs", 200),
        ("GET", "/v2/models/none", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v1/models/none:predict", 404),
        ("POST", "/v2/repository/models/none/load", 404),
        ("GET", "/nowhere", 404),
    ],
)
def test_each_path_has_its_status(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    if status == 404:
        assert set(response.json()) == {"error"}


def test_all_models_are_listed_with_their_state(client):
    assert client.get("/v2/models").json() == {"models": ["digits", "gone"]}
    states = client.post("/v2/repository/index").json()
    assert [(state["name"], state["state"]) for state in states] == [
        ("digits", "READY"),
        ("gone", "UNAVAILABLE"),
    ]


def test_the_gateway_returns_metrics_of_the_models(bundle):
    with make_client(digits=Application(make_host(bundle))) as client:
        client.post("/v2/models/digits/infer", json=v2_body(ZEROS))
        families = text_string_to_metric_families(client.get("/metrics").text)
        rows = next(family for family in families if family.name == "halyard_rows")
        assert {s.labels["version"]: s.value for s in rows.samples} == {"3": 1, "": 0}


class Context:
    """The context that Ray Serve passes to an autoscaling policy."""

    def __init__(self, queued=0, **reports):
        self.aggregated_metrics = reports
        self.running_replicas = ["a", "b"]
        self.total_queued_requests = queued
        self.config = type("Config", (), {"target_ongoing_requests": 32})


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        (Context(rows={"a": 0.0, "b": 0.0}, busy={"a": 0.0, "b": 0.0}), 0),
        (Context(rows={"a": 32.0, "b": 64.0}, busy={"a": 0.1, "b": 0.1}), 3),
        (Context(rows={"a": 1.0, "b": 1.0}, busy={"a": 1.0, "b": 0.75}), 2.5),
        (Context(rows={"a": 1.0, "dead": 640.0}, busy={}), 1 / 32),
        (Context(queued=16), 0.5),
    ],
)
def test_desired_replicas_follow_rows_and_utilization(context, wanted):
    assert autoscaling.desired_replicas(context)[0] == pytest.approx(wanted)


def test_the_target_comes_from_the_profile_unless_configured():
    profile = LatencyModel([1, 8, 16], [0.001, 0.004, 0.0079])
    assert autoscaling.target_rows(ServeConfig(), profile) == 16
    assert autoscaling.target_rows(ServeConfig(batching={"max_rows": 4}), profile) == 8
    assert autoscaling.target_rows(ServeConfig(autoscaling={"target_rows": 5}), profile) == 5


def test_utilization_follows_the_event_loop_or_the_engine():
    engine_s, answers = [0.0], [0]
    busy = autoscaling.Utilization(lambda: engine_s[0], lambda: answers[0])
    assert busy.share() == 0
    engine_s[0] += 1e6
    assert busy.share() == 1
    answers[0] += 1
    assert 0 < busy.share() <= 1
    assert busy.share() == 0


def test_a_replica_that_refuses_for_load_counts_as_busy():
    refused = [0]
    busy = autoscaling.Utilization(lambda: 0.0, lambda: 0, lambda: refused[0])
    assert busy.share() == 0
    refused[0] += 1
    assert busy.share() == 1
    assert busy.share() == 0


def test_a_long_batch_counts_as_busy_before_it_ends():
    """The engine's time grows while one batch runs; no batch ends meanwhile."""
    busy = autoscaling.Utilization(time.monotonic, lambda: 0)
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        pass
    assert busy.share() > 0.9
