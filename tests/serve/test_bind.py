"""The private names of Ray that serve.bind replaces, and the addresses that servers bind."""

import inspect
from types import SimpleNamespace

import pytest
from ray.serve._private import default_impl, grpc_util, http_util, replica
from ray.serve._private.controller import ServeController
from ray.serve.config import HTTPOptions

from serve import bind


class Server:
    """A server that records the addresses on which it should listen."""

    def __init__(self):
        self.addresses = []

    def add_insecure_port(self, address):
        self.addresses.append(address)
        return 1


def test_ray_serve_starts_its_servers_with_our_functions():
    assert replica.add_port_to_grpc_server is bind.add_port_to_grpc_server
    assert default_impl.add_grpc_address is bind.add_grpc_address
    # The name is looked up when a server starts, not on import.
    assert "import add_grpc_address" in inspect.getsource(grpc_util.start_grpc_server)
    started = inspect.getsource(replica.Replica._on_initialized)
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in started
    assert "call_function_from_import_path" in inspect.getsource(
        http_util.configure_http_middlewares
    )
    assert inspect.iscoroutinefunction(ServeController.get_http_config) or callable(
        ServeController.get_http_config
    )


@pytest.mark.parametrize(
    ("http_host", "node", "addresses"),
    [
        ("127.0.0.1", "127.0.0.1", ["127.0.0.1:9000"]),
        ("localhost", "10.0.0.5", ["127.0.0.1:9000"]),
        ("0.0.0.0", "10.0.0.5", ["10.0.0.5:9000", "127.0.0.1:9000"]),
        ("10.0.0.5", "10.0.0.5", ["10.0.0.5:9000", "127.0.0.1:9000"]),
        ("::", "fd00::5", ["127.0.0.1:9000", "[fd00::5]:9000"]),
    ],
)
def test_grpc_for_clients_listens_only_where_http_does(monkeypatch, http_host, node, addresses):
    monkeypatch.setattr(bind, "_http_host", http_host)
    monkeypatch.setattr(bind, "get_node_ip_address", lambda: node)
    server = Server()
    bind.add_grpc_address(server, "[::]:9000")
    assert server.addresses == addresses


@pytest.mark.parametrize(("tls", "context", "secure"), [(1, 1, True), (1, None, False), (0, 1, 0)])
def test_a_replica_uses_tls_if_rays_nodes_do(monkeypatch, tls, context, secure):
    monkeypatch.setenv("RAY_USE_TLS", str(tls))
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", "cert.pem")
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", "key.pem")
    monkeypatch.setattr(bind, "internal_replica_context", lambda: context)
    asked = []
    monkeypatch.setattr(
        bind, "_add_port_to_grpc_server", lambda server, address: asked.append(address)
    )
    server = Server()
    bind.add_grpc_address(server, "[::]:9000")
    assert (asked, server.addresses) == (
        (["127.0.0.1:9000"], []) if secure else ([], ["127.0.0.1:9000"])
    )
    monkeypatch.setattr(bind, "_start_asgi_http_server", lambda app, options: options)
    started = bind.start_asgi_http_server(None, HTTPOptions())
    assert started.ssl_certfile == ("cert.pem" if tls else None)
    assert started.ssl_keyfile == ("key.pem" if tls else None)
    # The name is looked up when a server starts, not on import.
    assert "return await start_asgi_http_server(" in inspect.getsource(replica.Replica)


def test_calls_between_deployments_use_the_nodes_address(monkeypatch):
    monkeypatch.setattr(bind, "get_node_ip_address", lambda: "10.0.0.5")
    server = Server()
    bind.add_port_to_grpc_server(server, "[::]:0")
    assert server.addresses == ["10.0.0.5:0"]


def test_grpc_is_local_until_the_http_host_is_known(monkeypatch):
    assert bind.grpc_hosts() == ["127.0.0.1"]
    options = SimpleNamespace(host="0.0.0.0")
    asked = SimpleNamespace(get_http_config=SimpleNamespace(remote=lambda: options))
    monkeypatch.setattr(bind, "_controller", lambda: asked)
    monkeypatch.setattr(bind.ray, "get", lambda value, timeout: value)
    monkeypatch.setattr(bind, "_http_host", "127.0.0.1")
    monkeypatch.setattr(bind, "get_node_ip_address", lambda: "10.0.0.5")
    bind.set_http_host()
    assert bind.grpc_hosts() == ["10.0.0.5", "127.0.0.1"]
