"""Access to every route and every gRPC method, for each kind of key and of web page.

The table of paths is generated from the routes, so it includes new routes automatically.
"""

import asyncio
import itertools
import json
import re._parser as parser
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from types import SimpleNamespace

import grpc
import pytest
import yaml

from cluster import auth
from cluster.errors import UserError
from cluster.ingress import haproxy_config
from serve import access as access_of_clients
from serve import security
from serve.access import Access, AllowedHosts, Guard
from serve.config import GatewayConfig
from serve.errors import Forbidden
from serve.grpc import call as grpc_call
from serve.grpc import service as protocol
from serve.grpc.messages import types
from serve.http import model_gateway
from serve.http.routes import ModelAPI
from serve.security import APIKey, KeyStore, TokenBucket
from tests.server import REPOSITORY
from tests.serving import client_of, make_host

SECRETS = {name: f"hk_{name:>043}" for name in ("admin", "reader", "stranger", "expired", "gone")}
# Routes that need no key: health, and pages without data.
OPEN = {
    "/v2/health/live",
    "/v2/health/ready",
    "/docs",
    "/docs/assets/x",
    "/v2/models/digits/docs",
    "/console/x",
    "/",
}
OPEN_METHODS = {"ServerLive", "ServerReady"}
FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:3000"},
    {"Origin": "http://127.0.0.1:8000.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Host": "evil.example"},
    {"Host": "evil.example:8000"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "127.0.0.1:8000@evil.example"},
]


def digest(name):
    return sha256(SECRETS[name].encode()).hexdigest()


def key_of(name, **options):
    return APIKey(name=name, sha256=digest(name), **options)


def make_keys():
    """Return a key of each kind; "gone" in SECRETS is the secret of a revoked key."""
    past = datetime.now(UTC) - timedelta(seconds=1)
    return KeyStore(
        [
            key_of("admin", admin=True, expires=datetime.now(UTC) + timedelta(days=1)),
            key_of("reader", models=["digits"]),
            key_of("stranger", models=["taxis"], admin=True),
            key_of("expired", admin=True, expires=past),
        ]
    )


def samples(pattern):
    """Return paths that match a pattern, with and without each of its optional parts."""
    return sorted(set(_samples(parser.parse(pattern))))


def _samples(parsed):
    parts = [list(_part(kind, value)) for kind, value in parsed]
    return ["".join(words) for words in itertools.product(*parts)]


def _part(kind, value):
    match str(kind):
        case "LITERAL":
            yield chr(value)
        case "IN" if str(value[0][0]) == "LITERAL":
            yield from (chr(character) for _, character in value)
        case "NOT_LITERAL" | "IN":
            yield "x"
        case "SUBPATTERN":
            # The first named group of a route is the model.
            yield from ["digits"] if value[0] in MODEL_GROUPS else _samples(value[3])
        case "BRANCH":
            for branch in value[1]:
                yield from _samples(branch)
        case "MAX_REPEAT":
            least, _, inner = value
            yield from _samples(inner)
            if least == 0:
                yield ""
        case other:
            raise NotImplementedError(other)


MODEL_GROUPS = {1}


def table(routes):
    """Return (access, method, path) of every route."""
    return [
        (route.access, method, path.replace("/versions/x", "/versions/3"))
        for pattern, route in routes.by_pattern.items()
        for path in samples(pattern)
        for method in route.methods
    ]


@pytest.fixture(scope="module")
def host(bundle):
    return make_host(bundle, keys=make_keys())


@pytest.fixture(scope="module")
def rest(host):
    return ModelAPI(host)


@pytest.fixture(scope="module")
def client(rest):
    with client_of(rest) as client:
        yield client


@pytest.fixture(scope="module")
def routes(rest):
    return table(rest.routes)


def ask(client, method, path, key=None, **headers):
    if key is not None:
        headers["Authorization"] = f"Bearer {SECRETS.get(key, key)}"
    return client.request(method, path, headers=headers)


def test_the_table_has_every_route(routes, rest):
    paths = {path for _, _, path in routes}
    for path in (
        "/v2/models/digits/infer",
        "/v2/models/digits/versions/3/infer",
        "/v1/models/digits:predict",
        "/v2/models/digits/feedback",
        "/v2/repository/models/digits/unload",
        "/openapi.json",
        "/v2",
        "/v1/models",
    ):
        assert path in paths
    for _, method, path in routes:
        rest.routes.match(method, path)


def test_only_health_and_pages_are_open(routes):
    open_paths = {path for access, _, path in routes if access in (Access.OPEN, Access.PAGE)}
    assert open_paths == OPEN
    methods = {name for name, access in protocol.ACCESS.items() if access is Access.OPEN}
    assert methods == OPEN_METHODS
    assert set(protocol.ACCESS) == set(protocol.METHODS)


@pytest.mark.parametrize("key", [None, "wrong", "expired", "gone", "", "Bearer"])
def test_without_a_valid_key_only_open_routes_are_allowed(client, routes, key):
    for _, method, path in routes:
        status = ask(client, method, path, key).status_code
        assert (status == 401) == (path not in OPEN), (method, path, status)


def test_a_key_for_another_model_sees_nothing_of_this_one(client, routes):
    for access, method, path in routes:
        answer = ask(client, method, path, "stranger")
        if access in (Access.MODEL, Access.FEEDBACK, Access.ADMIN):
            assert answer.status_code == 403, (method, path)
        elif access in (Access.KEY, Access.METRICS):
            assert answer.status_code == 200, (method, path)
            assert "digits" not in answer.text, (method, path)


def test_a_key_for_the_model_may_not_change_it(client, routes):
    for access, method, path in routes:
        status = ask(client, method, path, "reader").status_code
        assert (status == 403) == (access is Access.ADMIN), (method, path, status)
        assert status != 401


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: str(headers))
def test_every_route_refuses_pages_of_other_sites(client, routes, headers):
    for _, method, path in routes:
        answer = ask(client, method, path, "admin", **headers)
        assert answer.status_code == 403, (method, path, answer.text)
        assert set(answer.json()) == {"error"} if method != "HEAD" else True


def test_a_foreign_page_is_refused_even_without_keys(bundle):
    with client_of(ModelAPI(make_host(bundle))) as client:
        for headers in FOREIGN:
            answer = client.post("/v2/repository/models/digits/unload", headers=headers)
            assert answer.status_code == 403
        assert client.get("/v2/health/ready").json() == {"ready": True}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": "localhost:8000"},
        {"Host": "[::1]:8000"},
        {"Host": "192.0.2.7"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "http://localhost:9999", "Host": "localhost:9999"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": ""},
    ],
    ids=lambda headers: str(headers),
)
def test_programs_and_the_servers_own_pages_are_allowed(bundle, headers):
    with client_of(ModelAPI(make_host(bundle))) as client:
        body = {"instances": [[[[0]] * 8] * 8]}
        answer = client.post("/v1/models/digits:predict", content=json.dumps(body), headers=headers)
        assert answer.status_code == 200, answer.text
        load = client.post("/v2/repository/models/digits/load", headers=headers)
        assert load.status_code == 200, load.text


def test_another_site_can_link_to_pages_only(client, routes):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    for access, method, path in routes:
        refused = ask(client, method, path, "admin", **link).status_code == 403
        assert refused == (access is not Access.PAGE), (method, path)
        framed = ask(client, method, path, "admin", **link, **{"Sec-Fetch-Dest": "iframe"})
        assert framed.status_code == 403, (method, path)
    page = ask(client, "GET", "/v2/models/digits/docs", "admin")
    assert page.headers["content-security-policy"] == "frame-ancestors 'none'"


@pytest.mark.parametrize("loopback", [True, False])
def test_without_keys_only_this_machine_can_make_changes(bundle, loopback):
    rest = ModelAPI(make_host(bundle, loopback=loopback))
    with client_of(rest) as client:
        for access, method, path in table(rest.routes):
            status = ask(client, method, path).status_code
            closed = access in (Access.FEEDBACK, Access.ADMIN) and not loopback
            assert (status == 401) == closed, (method, path, status)


def test_metrics_can_be_open(bundle):
    with client_of(
        ModelAPI(make_host(bundle, keys=make_keys(), security={"metrics_without_key": True}))
    ) as client:
        assert ask(client, "GET", "/metrics").status_code == 200
        assert ask(client, "GET", "/v2/models/digits").status_code == 401


def test_an_unknown_path_is_reported_only_with_a_key(client):
    assert ask(client, "GET", "/nowhere").status_code == 401
    assert ask(client, "GET", "/nowhere", "reader").status_code == 404
    assert ask(client, "GET", "/nowhere", "reader", Host="evil.example").status_code == 403


def test_no_response_to_a_stranger_names_the_model(client):
    for path in ("/v2/models/taxis", "/v2/models/taxis/infer", "/v2/models/taxis/feedback"):
        for method in ("GET", "POST"):
            assert "digits" not in ask(client, method, path, "stranger").text


class Asked:
    """A model's application behind the gateway, which records its requests."""

    def __init__(self, name):
        self.name, self.asked = name, []

    async def forward(self, method, path, headers, body):
        self.asked.append((method, path))
        return 200, [], b"{}"

    async def index(self):
        return [{"name": self.name, "version": "1", "state": "READY"}]

    async def metrics(self):
        labels = {"model": self.name}
        return {"rows": ("counter", "Rows.", [("_total", labels, 1.0)])}


def test_the_gateway_of_several_models_has_the_same_rules(routes):
    models = {name: Asked(name) for name in ("digits", "taxis")}
    find = models.__getitem__
    config = GatewayConfig(models=list(models))
    application = model_gateway.ModelGateway(find, find, Guard(make_keys(), loopback=True), config)
    with client_of(application) as client:
        for _, method, path in routes:
            if path == "/openapi.json":
                continue  # exists only on a server of one model
            for key in (None, "wrong", "expired", "gone"):
                refused = ask(client, method, path, key).status_code == 401
                assert refused == (path not in OPEN), (method, path)
            for headers in FOREIGN:
                status = ask(client, method, path, "admin", **headers).status_code
                assert status == 403, (method, path)
        assert ("POST", "/v2/repository/models/digits/load") not in models["digits"].asked
        assert client.get("/docs").text.count("digits") == 0
        for path in ("/v2/models", "/metrics"):
            seen = ask(client, "GET", path, "stranger").text
            assert "taxis" in seen
            assert "digits" not in seen
        index = ask(client, "POST", "/v2/repository/index", "stranger").json()
        assert [model["name"] for model in index] == ["taxis"]


# gRPC.


def of_model(method):
    """Return a serialized request for the model."""
    request = getattr(types, f"{method}Request")()
    for field in ("model_name", "name"):
        if field in request.DESCRIPTOR.fields_by_name:
            setattr(request, field, "digits")
            break
    return request.SerializeToString()


def codes(host, metadata):
    """Return the response or the status code of each gRPC method, by its name."""

    async def scenario():
        service = protocol.InferenceService(host)
        server, port = await protocol.start_server(service, 0, max_message_bytes=2**20)
        found = {}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method in protocol.METHODS:
                call = channel.unary_unary(f"/{protocol.SERVICE}/{method}")
                try:
                    found[method] = await call(of_model(method), metadata=metadata, timeout=30)
                except grpc.aio.AioRpcError as error:
                    found[method] = error.code()
        await server.stop(0)
        return found

    return asyncio.run(scenario())


def bearer(key):
    return () if key is None else (("authorization", f"Bearer {SECRETS.get(key, key)}"),)


@pytest.mark.parametrize("key", [None, "wrong", "expired", "gone"])
def test_grpc_without_a_valid_key_allows_health_only(host, key):
    for method, found in codes(host, bearer(key)).items():
        refused = found == grpc.StatusCode.UNAUTHENTICATED
        assert refused == (method not in OPEN_METHODS), (method, found)


def test_grpc_shows_nothing_to_a_key_for_another_model(host):
    for method, found in codes(host, bearer("stranger")).items():
        access = protocol.ACCESS[method]
        if access in (Access.MODEL, Access.ADMIN):
            assert found == grpc.StatusCode.PERMISSION_DENIED, method
        else:
            assert b"digits" not in found, method


def test_grpc_refuses_changes_with_a_key_for_the_model(host):
    for method, found in codes(host, bearer("reader")).items():
        refused = found == grpc.StatusCode.PERMISSION_DENIED
        assert refused == (protocol.ACCESS[method] is Access.ADMIN), (method, found)


@pytest.mark.parametrize(
    "headers", [("origin", "http://evil.example"), ("sec-fetch-site", "cross-site")]
)
def test_grpc_refuses_pages_of_other_sites(host, headers):
    for method, found in codes(host, (*bearer("admin"), headers)).items():
        assert found == grpc.StatusCode.PERMISSION_DENIED, method


@pytest.mark.parametrize("loopback", [True, False])
def test_grpc_without_keys_allows_changes_by_this_machine_only(bundle, loopback):
    for method, found in codes(make_host(bundle, loopback=loopback), ()).items():
        closed = protocol.ACCESS[method] is Access.ADMIN and not loopback
        assert (found == grpc.StatusCode.UNAUTHENTICATED) == closed, (method, found)


# Host names of the server.


@pytest.mark.parametrize(
    ("listed", "host", "known"),
    [
        ([], "api.example.com", False),
        (["api.example.com"], "api.example.com", True),
        (["api.example.com"], "API.Example.com.:443", True),
        (["api.example.com"], "evil.api.example.com", False),
        (["*.example.com"], "api.example.com", True),
        (["*.example.com"], "example.com", False),
        (["*.example.com"], "evilexample.com", False),
        (["*"], "anything", True),
        ([], "localhost", True),
        ([], "localhost.evil.example", False),
        ([], "2130706433", False),
        ([], "[::1]", True),
        ([], "[::1", False),
        ([], "127.0.0.1:port", False),
        ([], "127.0.0.1/evil", False),
        ([], "", False),
        ([], "a" * 10_000, False),
    ],
)
def test_allowed_hosts_are_addresses_and_configured_names(listed, host, known):
    assert AllowedHosts(listed).has(host) is known


def test_a_listed_host_is_no_foreign_site_behind_a_gateway():
    guard = Guard(None, loopback=True, hosts=["api.example.com", "replica"])

    def headers(origin):
        found = {b"host": "replica:8000", b"origin": origin}
        return found.get

    guard.check_page(headers("https://api.example.com"), method="POST", access=Access.MODEL)
    for hosts in (["api.example.com", "replica"], ["*"], ["*.example.com", "replica"]):
        guard = Guard(None, loopback=True, hosts=hosts)
        with pytest.raises(Forbidden):
            guard.check_page(
                headers("https://evil.example.com"), method="POST", access=Access.MODEL
            )


# The file of keys.


def write_keys(path, *keys):
    path.write_text(yaml.safe_dump([key.model_dump(exclude_none=True) for key in keys]))


def test_a_changed_file_of_keys_is_used_within_seconds(tmp_path):
    path = tmp_path / "keys.yaml"
    write_keys(path, key_of("reader", rate=2), key_of("gone"))
    keys = KeyStore.load(str(path))
    gone, reader = f"Bearer {SECRETS['gone']}", f"Bearer {SECRETS['reader']}"
    assert keys.check(gone, 0.0).name == "gone"
    keys.check(reader, 0.0)
    write_keys(path, key_of("reader", rate=2))
    with pytest.raises(security.Unauthorized):
        keys.check(gone, 5.0)
    write_keys(path, key_of("reader", rate=2), key_of("admin", admin=True))
    assert keys.check(f"Bearer {SECRETS['admin']}", 10.0).admin
    # The key keeps its token bucket when the file changes; ten seconds have filled it again.
    assert [keys.check(reader, 10.0).name for _ in range(2)] == ["reader"] * 2
    with pytest.raises(security.RateLimited):
        keys.check(reader, 10.0)
    path.write_text("- [")  # incomplete, as while the file is being written
    assert keys.check(f"Bearer {SECRETS['admin']}", 15.0)
    path.unlink()
    with pytest.raises(security.Unauthorized):
        keys.check(f"Bearer {SECRETS['admin']}", 20.0)


@pytest.mark.parametrize("rate", [0.5, 2, 7])
def test_a_token_is_there_after_the_stated_wait_and_not_before(rate):
    bucket, now = TokenBucket(rate), 100.0
    while not (wait_s := bucket.take(now)):
        pass
    assert bucket.take(now + 0.9 * wait_s) > 0
    assert bucket.take(now + wait_s + 1e-9) == 0


def test_the_command_makes_expiring_keys_and_revokes_them(tmp_path, capsys):
    path = tmp_path / "keys.yaml"
    security.main(["team", "--file", str(path), "--expires", "2d"])
    secret = capsys.readouterr().out.strip()
    keys = KeyStore.load(str(path))
    left = keys.check(f"Bearer {secret}", 0.0).expires - datetime.now(UTC)
    assert timedelta(days=1, hours=23) < left <= timedelta(days=2)
    assert path.stat().st_mode & 0o077 == 0
    security.main(["team", "--file", str(path), "--revoke"])
    with pytest.raises(security.Unauthorized):
        KeyStore.load(str(path)).check(f"Bearer {secret}", 0.0)
    for wrong in (["team", "--revoke"], ["x", "--expires", "soon"], ["x", "--expires", "0x"]):
        with pytest.raises(UserError):
            security.main([*wrong, "--file", str(path)])


def test_a_time_without_a_zone_is_in_utc():
    key = APIKey.model_validate({"name": "a", "sha256": "0" * 64, "expires": "2027-01-31T12:00:00"})
    assert key.expires == datetime(2027, 1, 31, 12, tzinfo=UTC)


# The audit log.


def test_changes_are_audited_with_their_client(bundle, tmp_path):
    host = make_host(bundle, keys=make_keys(), storage=str(tmp_path))
    with client_of(ModelAPI(host)) as client:
        ask(client, "POST", "/v2/repository/models/digits/unload", "admin", **{"X-Request-ID": "a"})
        ask(client, "POST", "/v2/repository/models/digits/load", "admin", **{"X-Request-ID": "b"})
        ask(client, "POST", "/v2/repository/models/digits/load", "reader")
        feedback = client.post(
            "/v2/models/digits/feedback",
            json={"id": "r7", "truth": ["1"]},
            headers={"Authorization": f"Bearer {SECRETS['reader']}", "X-Request-ID": "c"},
        )
    assert feedback.status_code == 400
    path = tmp_path / "audit" / "digits.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    seen = [(line["action"], line["client"], line["request"]) for line in lines]
    assert seen == [
        ("unload", "admin", "a"),
        ("load", "admin", "b"),
        ("feedback", "reader", "c"),
    ]
    assert [line["outcome"].partition(":")[0] for line in lines] == ["done", "done", "refused"]
    for line in lines:
        assert line["model"] == "digits"
        assert line["address"] == "testclient"
        assert abs(datetime.fromisoformat(line["time"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_clients_address_is_accepted_from_haproxy_only(monkeypatch):
    from serve.http import request

    monkeypatch.setenv(auth.TOKEN, "0" * 64)
    monkeypatch.setattr(access_of_clients, "_proof", haproxy_config.proof_prefix)
    proven = f"{haproxy_config.proof_prefix()} 203.0.113.9"
    direct = "198.51.100.1"
    for behind, peers, address in (
        (True, [proven], "203.0.113.9"),
        # A trailer that the client sends comes after the headers.
        (True, [proven, f"{haproxy_config.proof_prefix()[::-1]} 192.0.2.1"], "203.0.113.9"),
        # Requests that are sent directly to the replica.
        (True, ["203.0.113.9"], direct),
        (True, ["- 203.0.113.9"], direct),
        (True, [], direct),
        (False, [proven], direct),
    ):
        monkeypatch.setattr(request, "BEHIND_HAPROXY", behind)
        monkeypatch.setattr(grpc_call, "BEHIND_HAPROXY", behind)
        scope = {
            "method": "GET",
            "path": "/",
            "headers": [(b"x-halyard-peer", peer.encode()) for peer in peers],
            "client": (direct, 5),
        }
        assert request.Request(scope, None).actor.address == address
        metadata = tuple(("x-halyard-peer", peer) for peer in peers)
        context = SimpleNamespace(
            invocation_metadata=lambda metadata=metadata: metadata, peer=lambda: direct
        )
        assert grpc_call.GrpcCall("ModelInfer", context).actor.address == address


@pytest.mark.parametrize(
    "limit",
    ["models:", "models: []", "expires:", "expires: 20261201000000", "rate:", "rate: 0", "admin:"],
)
def test_a_limit_of_a_key_without_a_value_is_refused(tmp_path, limit):
    path = tmp_path / "keys.yaml"
    path.write_text(f"- name: team\n  sha256: {'0' * 64}\n  {limit}\n")
    with pytest.raises(UserError, match="is not a list of keys"):
        KeyStore.load(str(path))
    with pytest.raises(UserError):
        security.main(["other", "--models", "", "--file", str(tmp_path / "new.yaml")])
    assert not (tmp_path / "new.yaml").exists()


def test_concurrent_changes_of_keys_lose_nothing(tmp_path, capsys):
    path = tmp_path / "keys.yaml"
    security.main(["gone", "--file", str(path)])
    commands = [[f"team{number}"] for number in range(6)] + [["gone", "--revoke"]]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "serve.security", *command, "--file", str(path)],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
        )
        for command in commands
    ]
    assert [process.wait(60) for process in started] == [0] * len(started)
    names = [entry["name"] for entry in yaml.safe_load(path.read_text())]
    assert sorted(names) == [f"team{number}" for number in range(6)]
