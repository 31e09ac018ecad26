"""Requests whose replica dies before it responds, and requests to a HAProxy that is stopping."""

import http.client
import os
import socket
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import pytest

from cluster import serve_environment
from cluster.ingress.certificates import ask
from tests.cluster.test_haproxy_config import RAYS, free_port

SMALL, LARGE, LARGER = b"{}", b"x" * 40_000, b"x" * 1_000_000
INFER, LOAD = "/v2/models/digits/infer", "/v2/repository/models/digits/load"
# The values that the server's environment sets.
DEFAULTS = """defaults
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option redispatch 1
    retry-on conn-failure empty-response
    retries 1
    option idle-close-on-response
    errorfile 502 {folder}/502.http
    errorfile 503 {folder}/503.http
"""


class Replica:
    """A replica that answers every request; if `dies`, it resets connections of large ones."""

    def __init__(self, name, *, dies):
        self.name, self.dies, self.asked = name, dies, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        with suppress(OSError):  # wakes the thread that accepts
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                made, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(made,), daemon=True).start()

    def _answer(self, made):
        with made, suppress(OSError), made.makefile("rb") as reader:
            while line := reader.readline():
                length = 0
                while (header := reader.readline()) != b"\r\n":
                    name, _, value = header.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                if b"GET" in line or length <= len(SMALL):
                    reader.read(length)
                else:
                    self.asked += 1
                    if self.dies:
                        # Reset the connection, as a process does that is killed with unread data.
                        made.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                        return
                    reader.read(length)
                body = self.name.encode()
                made.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class Ingress:
    """HAProxy in front of some replicas, started the way Ray starts it."""

    def __init__(self, folder):
        self.folder, self.port, self.started = folder, free_port(), []
        self.config = folder / "haproxy.cfg"

    def start(self, *replicas):
        """Start HAProxy; it takes over from a process that was started before."""
        servers = "".join(
            f"    server {each.name} 127.0.0.1:{each.port} check inter 100ms\n" for each in replicas
        )
        self.config.write_text(
            RAYS.replace("global\n", "global\n    maxconn 100\n    tune.bufsize 65536\n")
            .replace("defaults\n", DEFAULTS.format(folder=self.folder))
            .replace("/tmp/x/admin.sock", str(self.folder / "admin.sock"))
            .replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
            .replace("127.0.0.1:9000", f"unix@{self.folder}/grpc")
            .replace("backend http-default\n", f"backend http-default\n{servers}")
        )
        old = ["-sf", str(self.started[-1].pid)] if self.started else []
        process = subprocess.Popen(
            [str(serve_environment.WRAPPER), "-db", "-f", str(self.config), *old],
            env={**os.environ, **serve_environment.local_paths()},
            stderr=subprocess.DEVNULL,
        )
        self.started.append(process)
        while True:
            with suppress(OSError):
                if f"Pid: {process.pid}\n" in ask(self.folder / "admin.sock", "show info"):
                    return
            assert process.poll() is None
            time.sleep(0.01)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)


@contextmanager
def ingress(tmp_path):
    folder = tmp_path / "haproxy"
    folder.mkdir()
    made = Ingress(folder)
    try:
        yield made
    finally:
        for process in made.started:
            process.kill()
            process.wait()


@contextmanager
def replicas(**dies):
    with ExitStack() as stack:
        made = [Replica(name, dies=each) for name, each in dies.items()]
        for each in made:
            stack.callback(each.close)
        yield made


def asked(connection, body, path=INFER):
    connection.request("POST", path, body)
    answer = connection.getresponse()
    return answer.status, answer.getheader("retry-after"), answer.read()


def test_a_large_request_is_retried_if_its_replica_dies(tmp_path):
    with ingress(tmp_path) as haproxy, replicas(a=True, b=False) as (dying, living):
        haproxy.start(dying, living)
        connection = haproxy.connect()
        # Use a connection that has already had a response.
        assert asked(connection, SMALL)[0] == 200
        for _ in range(6):
            assert asked(connection, LARGE)[::2] == (200, b"b")
        assert dying.asked > 0
        assert living.asked == 6


@pytest.mark.parametrize(
    ("body", "path", "most"), [(LARGE, INFER, 2), (LARGE, LOAD, 1), (LARGER, INFER, 1)]
)
def test_a_request_that_kills_replicas_is_retried_at_most_once(tmp_path, body, path, most):
    """HAProxy sends it twice, or once if it changes state or is too long; then it responds 503."""
    with ingress(tmp_path) as haproxy, replicas(a=True, b=True, c=True) as all_of_them:
        haproxy.start(*all_of_them)
        connection = haproxy.connect()
        assert asked(connection, SMALL)[0] == 200
        began = time.monotonic()
        status, again, words = asked(connection, body, path)
        # The retry comes a little later, when the dead replica's sockets are closed.
        assert (time.monotonic() - began > 0.2) == (most == 2)
        assert (status, again) == (503, "1")
        assert b"send the request again" in words
        assert sum(each.asked for each in all_of_them) == most


@pytest.mark.parametrize("body", [SMALL, LARGE])
def test_an_idle_connection_reaches_replicas_that_came_later(tmp_path, body):
    with ingress(tmp_path) as haproxy, replicas(a=False, b=False, c=False) as (a, b, c):
        haproxy.start(a, b)
        connection, kept = haproxy.connect(), haproxy.connect()
        assert {asked(each, SMALL)[0] for each in (connection, kept)} == {200}
        a.close()
        b.close()
        haproxy.start(c)
        assert asked(connection, body)[::2] == (200, b"c")
        # And after another change.
        c.dies = True
        with replicas(d=False) as (d,):
            c.close()
            haproxy.start(d)
            assert asked(kept, body)[::2] == (200, b"d")
