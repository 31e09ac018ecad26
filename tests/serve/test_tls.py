"""A server with TLS that requires client certificates, used by common clients."""

import asyncio
import shutil
import subprocess
import threading
import time

import grpc
import httpx
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from serve import Client, RequestFailed
from tests import server, wire_fuzz
from tests.authority import Authority
from tests.serve.http.test_routes import ZEROS, v2_body
from tests.serve.test_clients import GRPC, HTTP, IMAGES, same, tensor
from train.bundle import Predictor

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INFER = "/v2/models/digits/infer"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def client_files(authority):
    return authority.issue("client")


@pytest.fixture(scope="module")
def server_files(authority):
    return authority.issue("server")


@pytest.fixture(scope="module")
def url(bundle, authority, client_files, server_files, tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    log = storage / "serve.log"
    options = [
        f"model={bundle.path}",
        f"storage={storage}",
        f"security.tls_cert={server_files[0]}",
        f"security.tls_key={server_files[1]}",
        f"security.tls_client_ca={authority.file}",
    ]
    tls = authority.context(client=client_files)
    with server.running(*options, log=log, tls=tls) as url:
        deadline = time.monotonic() + 60
        while f"at {url}" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url


def test_tritons_http_client_works_over_tls(url, bundle, authority, client_files):
    client = triton_http.InferenceServerClient(
        HTTP, ssl=True, ssl_context_factory=lambda: authority.context(client=client_files)
    )
    expected = Predictor.load(bundle).predict([{"image": image} for image in IMAGES])
    same(client.infer("digits", [tensor(triton_http)]), expected)


def test_tritons_grpc_client_works_over_tls(url, bundle, authority, client_files):
    cert, key = map(str, client_files)
    files = {"root_certificates": str(authority.file), "certificate_chain": cert}
    expected = Predictor.load(bundle).predict([{"image": image} for image in IMAGES])
    with triton_grpc.InferenceServerClient(GRPC, ssl=True, private_key=key, **files) as client:
        same(client.infer("digits", [tensor(triton_grpc)]), expected)


def test_the_projects_client_works_over_tls(url, bundle, authority, client_files):
    expected = Predictor.load(bundle).predict([{"image": image} for image in IMAGES])
    files = {"ca_file": str(authority.file), "client_cert": tuple(map(str, client_files))}
    with Client(url, **files) as client:
        assert list(client.predict(IMAGES)["label"]) == list(expected["label"])
    stranger = Client(url, ca_file=str(authority.file), retries=0)
    with pytest.raises(RequestFailed, match="certificate"):
        stranger.predict(IMAGES)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("version", ["1.1", "2"])
def test_curl_works_over_tls(url, authority, client_files, version):
    cert, key = map(str, client_files)
    command = ["curl", "--silent", "--show-error", f"--http{version}", "--cert", cert, "--key", key]
    command += ["--cacert", str(authority.file), "--write-out", "%{http_code} %{http_version}"]
    command += ["--output", "/dev/null", f"{url}/v2/health/ready"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"200 {version}"


def test_a_client_without_a_certificate_is_refused(url, authority):
    with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectError)):
        httpx.get(f"{url}/v2/health/live", verify=authority.context(), trust_env=False)
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with (
        triton_grpc.InferenceServerClient(GRPC, creds=credentials, ssl=True) as client,
        pytest.raises(triton_grpc.InferenceServerException, match="UNAVAILABLE"),
    ):
        client.is_server_live(client_timeout=5)


def test_malformed_input_causes_no_server_error(url, authority, client_files):
    def context(protocol):
        return authority.context(protocol, client=client_files)

    outcome = asyncio.run(wire_fuzz.attack(range(2_000), 0, (8000, 9000), context))
    assert outcome.faults == []
    answered = {kind.split()[-1] for kind in outcome.counts}
    assert {"200", "400", "grpc=0", "grpc=3", "none"} <= answered
    with httpx.Client(verify=authority.context(client=client_files), trust_env=False) as client:
        assert client.post(f"{url}{INFER}", json=v2_body(ZEROS)).status_code == 200


def test_no_request_is_lost_while_certificates_change(url, authority, client_files, server_files):
    """One client keeps its connection; another opens one per request and gets new certificates."""
    body = v2_body(ZEROS)
    context = authority.context(client=client_files)
    seen, failures, ended = set(), [], threading.Event()

    def ask(client):
        answer = client.post(f"{url}{INFER}", json=body)
        if answer.status_code != 200:
            failures.append(answer.status_code)
        stream = answer.extensions["network_stream"].get_extra_info("ssl_object")
        return stream.getpeercert()["serialNumber"]

    def keep():
        with httpx.Client(verify=context, trust_env=False) as client:
            first = ask(client)
            while not ended.is_set():
                if ask(client) != first:
                    failures.append("the connection was opened again")

    keeping = threading.Thread(target=keep)
    keeping.start()
    try:
        for _ in range(2):
            before = len(seen)
            authority.issue("server")
            deadline = time.monotonic() + 30
            while len(seen) < before + 1 + (before == 0):
                assert time.monotonic() < deadline
                with httpx.Client(verify=context, trust_env=False) as client:
                    seen.add(ask(client))
    finally:
        ended.set()
        keeping.join()
    assert not failures
    assert len(seen) == 3
