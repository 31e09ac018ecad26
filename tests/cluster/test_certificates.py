"""TLS at HAProxy: protocols, client certificates, and certificates that change while it runs."""

import os
import socket
import ssl
import subprocess
import time
from contextlib import contextmanager

import httpx
import psutil
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from cluster import serve_environment
from cluster.ingress import certificates
from cluster.ingress.certificates import Certificates
from tests.authority import Authority
from tests.cluster.test_haproxy_config import RAYS, free_port

RENEWED_S = 20


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


class Running:
    """A HAProxy without replicas, started the way Ray starts it."""

    def __init__(self, folder, files):
        self.folder = folder
        self.port, self.grpc_port = free_port(), free_port()
        self.config = folder / "haproxy.cfg"
        self.config.write_text(
            RAYS.replace("/tmp/x/admin.sock", str(folder / "admin.sock"))
            .replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
            .replace("127.0.0.1:9000", f"127.0.0.1:{self.grpc_port}")
            .replace("defaults\n", "defaults\n timeout connect 5s\n timeout client 60s\n")
        )
        self.environment = {**os.environ, **serve_environment.local_paths(), **files.environment()}
        self.started = []
        self.process = self.start()

    def start(self, *arguments):
        """Start HAProxy, or a second one that takes over; return its process once it responds."""
        command = [str(serve_environment.WRAPPER), "-db", "-f", str(self.config), *arguments]
        process = subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)
        self.started.append(process)
        while not self.is_answered_by(process):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        self.process = process
        return process

    def is_answered_by(self, process):
        try:
            answer = certificates.ask(self.folder / "admin.sock", "show info")
        except OSError:
            return False
        return f"Pid: {process.pid}\n" in answer

    def connect(self, context, port=None):
        plain = socket.create_connection(("127.0.0.1", port or self.port), timeout=10)
        return context.wrap_socket(plain, server_hostname="localhost")

    def certificate(self, context):
        """Return the serial number of the certificate that a new connection receives."""
        with self.connect(context) as made:
            return made.getpeercert()["serialNumber"]

    def asks(self, connection):
        """Send a request on a connection; return its status line."""
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"</html>\n"):
            more = connection.recv(65536)
            assert more, answer
            answer += more
        return answer.partition(b"\r\n")[0]

    def await_certificate(self, context, serial):
        deadline = time.monotonic() + RENEWED_S
        while self.certificate(context) != serial:
            assert time.monotonic() < deadline, "HAProxy still sends the old certificate"
            time.sleep(0.05)

    def await_said(self, words):
        """Return the first line on stderr of HAProxy and its renewal process that has `words`."""
        for line in self.process.stderr:
            if words in line:
                return line.strip()
        raise AssertionError(f"'{words}' was not printed")


@contextmanager
def running(folder, *files):
    place = folder / "haproxy"
    place.mkdir()
    made = Running(place, Certificates(*map(str, files)))
    try:
        yield made
    finally:
        for process in made.started:
            process.kill()
            process.communicate()


def serial(path):
    return ssl._ssl._test_decode_cert(str(path))["serialNumber"]


def test_http_and_grpc_are_served_over_tls(tmp_path, authority):
    with running(tmp_path, *authority.issue("server")) as haproxy:
        for protocols, port, chosen in (
            (("h2", "http/1.1"), haproxy.port, "h2"),
            (("http/1.1",), haproxy.port, "http/1.1"),
            ((), haproxy.port, None),
            (("h2",), haproxy.grpc_port, "h2"),
        ):
            with haproxy.connect(authority.context(*protocols), port) as made:
                assert made.selected_alpn_protocol() == chosen
                assert made.version() == "TLSv1.3"
        url = f"https://localhost:{haproxy.port}/"
        for both in (True, False):
            with httpx.Client(verify=authority.context(), http2=both, trust_env=False) as client:
                answer = client.get(url)
            assert answer.status_code == 503
            assert answer.http_version == ("HTTP/2" if both else "HTTP/1.1")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url.replace("https", "http"), trust_env=False)
        kept = haproxy.folder / certificates.SERVER
        assert kept.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("form", ["one file", "windows lines", "parameters"])
def test_other_forms_of_pem_are_read_and_renewed(tmp_path, authority, form):
    cert, key = authority.issue("server")

    def written():
        if form == "one file":
            cert.write_bytes(cert.read_bytes() + key.read_bytes())
        elif form == "windows lines":
            for each in (cert, key):
                each.write_bytes(each.read_bytes().replace(b"\n", b"\r\n"))
        else:  # as `openssl ecparam -genkey` writes it
            curve = (
                b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
            )
            key.write_bytes(curve + b"\n" + key.read_bytes())

    written()
    with running(tmp_path, cert, cert if form == "one file" else key) as haproxy:
        context = authority.context()
        assert haproxy.certificate(context) == serial(cert)
        authority.issue("server")
        written()
        haproxy.await_certificate(context, serial(cert))


def test_old_versions_of_tls_are_refused(tmp_path, authority):
    with running(tmp_path, *authority.issue("server")) as haproxy:
        context = authority.context()
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(ssl.SSLError):
            haproxy.connect(context)


def test_a_client_certificate_is_required_if_configured(tmp_path, authority):
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    server, client = authority.issue("server"), authority.issue("client")
    with running(tmp_path, *server, authority.file) as haproxy:
        with haproxy.connect(authority.context(client=client)) as made:
            assert haproxy.asks(made).startswith(b"HTTP/1.1 503")
        for refused in (
            authority.context(),
            authority.context(client=other.issue("client")),
        ):
            # In TLS 1.3 a client learns of the rejection after its own part of the handshake.
            with pytest.raises((ssl.SSLError, ConnectionError)), haproxy.connect(refused) as made:
                haproxy.asks(made)


def test_a_changed_certificate_is_used_and_connections_stay(tmp_path, authority):
    cert, key = authority.issue("server")
    with running(tmp_path, cert, key) as haproxy:
        context = authority.context()
        with haproxy.connect(context) as before:
            assert haproxy.asks(before).startswith(b"HTTP/1.1 503")
            for _ in range(2):
                authority.issue("server")
                haproxy.await_certificate(context, serial(cert))
                assert haproxy.asks(before).startswith(b"HTTP/1.1 503")
        assert haproxy.process.poll() is None
        # A HAProxy that starts later uses the new certificate from the start.
        haproxy.start("-sf", str(haproxy.process.pid))
        assert haproxy.certificate(context) == serial(cert)
        authority.issue("server")
        haproxy.await_certificate(context, serial(cert))


def test_a_half_written_pair_leaves_the_old_one_in_use(tmp_path, authority):
    cert, key = authority.issue("server")
    with running(tmp_path, cert, key) as haproxy:
        context, former = authority.context(), serial(cert)
        new_cert, new_key = authority.issue("new")
        cert.write_bytes(new_cert.read_bytes())
        said = haproxy.await_said("the previous certificates stay in use")
        assert "does not belong to the certificate" in said
        assert haproxy.certificate(context) == former
        # Replace HAProxy meanwhile, as Ray does when replicas change.
        haproxy.start("-sf", str(haproxy.process.pid))
        assert haproxy.certificate(context) == former
        new_key.replace(key)
        haproxy.await_certificate(context, serial(new_cert))


def test_a_changed_authority_file_applies_to_clients(tmp_path, authority):
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    client = other.issue("client")
    with running(tmp_path, *authority.issue("server"), authority.file) as haproxy:
        context = authority.context(client=client)
        with (
            pytest.raises((ssl.SSLError, ConnectionError)),
            haproxy.connect(context) as made,
        ):
            haproxy.asks(made)
        with authority.file.open("ab") as file:
            file.write(other.file.read_bytes())
        haproxy.await_said("HAProxy has loaded the changed certificates")
        with haproxy.connect(context) as made:
            assert haproxy.asks(made).startswith(b"HTTP/1.1 503")


def test_the_renewal_process_ends_with_haproxy(tmp_path, authority):
    with running(tmp_path, *authority.issue("server")) as haproxy:
        renewing = [
            each
            for each in psutil.process_iter(["cmdline"])
            if str(haproxy.config) in (each.info["cmdline"] or [])
            and each.pid != haproxy.process.pid
        ]
        assert len(renewing) == 1
        haproxy.process.kill()
        haproxy.process.wait()
        renewing[0].wait(RENEWED_S)


def encrypted(path):
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda cert, key, ca: cert.unlink(), "server.pem' cannot be read"),
        (lambda cert, key, ca: key.unlink(), "server.key' cannot be read"),
        (lambda cert, key, ca: ca.unlink(), "authority.pem' cannot be read"),
        (lambda cert, key, ca: encrypted(key), "is encrypted; expected a key without a password"),
        (lambda cert, key, ca: cert.write_text("none"), "are not a certificate and its key in PEM"),
        (lambda cert, key, ca: key.write_bytes(b"\xff"), "are not a certificate and its key"),
        (lambda cert, key, ca: key.write_text(cert.read_text()), "are not a certificate and its"),
        (lambda cert, key, ca: ca.write_text("none"), "has no certificates in PEM format"),
        (
            lambda cert, key, ca: trustme.CA().issue_cert("x").private_key_pem.write_to_path(key),
            "does not belong to the certificate",
        ),
    ],
)
def test_an_unusable_certificate_is_reported(tmp_path, authority, spoil, words):
    cert, key = authority.issue("server")
    spoil(cert, key, authority.file)
    with pytest.raises(ValueError, match=words):
        Certificates(str(cert), str(key), str(authority.file)).read()
    environment = Certificates(str(cert), str(key), str(authority.file)).environment()
    config = tmp_path / "haproxy.cfg"
    config.write_text(RAYS)
    done = subprocess.run(
        [str(serve_environment.WRAPPER), "-db", "-f", str(config)],
        env={**os.environ, **serve_environment.local_paths(), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("HAProxy is not started: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_certificate_needs_its_key(monkeypatch):
    monkeypatch.setenv(certificates.CERT, "server.pem")
    monkeypatch.delenv(certificates.KEY, raising=False)
    words = "HALYARD_TLS_CERT and HALYARD_TLS_KEY must be set together"
    with pytest.raises(ValueError, match=words):
        certificates.from_environment()
