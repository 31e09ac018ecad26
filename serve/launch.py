"""Checks before a server starts, and the start of Ray and Ray Serve."""

import os
import sys
from typing import NoReturn

from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from cluster import connect, ray_internals, serve_environment
from cluster.errors import EXIT_FAILED, EXIT_USER_ERROR, CommandFailed, UserError
from cluster.ingress import certificates, haproxy_config
from cluster.nodes import node_checks, run_on_nodes
from serve import config as configs
from serve.config import ServeConfig
from serve.inference.latency_model import LatencyModel
from serve.requestlog import writer
from serve.security import KeyStore
from serve.state import ServingState
from serve.telemetry import tracing
from train.bundle import Bundle
from train.bundle.manifest import rank_variants

# Seconds that idle connections to a replica stay open: longer than HAProxy keeps them idle.
KEEP_ALIVE_S = 120

# Seconds to wait for the response of a node of a busy cluster.
ASK_S = 30.0


def check_environment() -> None:
    """Raise UserError if this node's Ray was started without the server's environment.

    On such a node Ray's proxies would listen on all interfaces.
    """
    if ray_internals.is_worker() and not node_checks.gateway_path():
        raise UserError(
            "Ray was started without the server's environment. Before it starts, run: "
            "source <(python -m serve.environment)"
        )


def all_nodes_prepared() -> bool:
    """Return whether Ray was started on every node with the server's environment.

    Nodes without it are printed to stderr. On these, Ray's own proxy handles requests, whose gRPC
    server listens on all interfaces.
    """
    nodes = run_on_nodes.run_on_each(
        run_on_nodes.alive_nodes(), node_checks.gateway_path, timeout_s=ASK_S
    )
    missing = sorted(address for address, (gateway, _) in nodes.items() if not gateway)
    if missing:
        print(
            f"serving without HAProxy and gRPC, because Ray was started on {', '.join(missing)} "
            "without the server's environment. Before Ray starts, run there: "
            "source <(python -m serve.environment)",
            file=sys.stderr,
        )
    return not missing


def check_certificate_of_nodes(config: ServeConfig) -> None:
    """Raise UserError if HAProxy on a node uses another TLS certificate than the configured one.

    HAProxy reads the names of its files from the environment in which Ray was started.
    """
    asked = config.security.certificates
    expected = asked.environment()[certificates.CERT] if asked else ""
    nodes = run_on_nodes.run_on_each(
        run_on_nodes.alive_nodes(), node_checks.tls_certificate, timeout_s=ASK_S
    )
    for address, (found, problem) in nodes.items():
        if not problem and found != expected:
            raise UserError(
                f"security.tls_cert is {_quoted(expected)}, but Ray was started on {address} with "
                f"{_quoted(found)}. Before it starts, run: source <(python -m serve.environment "
                "--tls-cert CERT --tls-key KEY)"
            )


def _quoted(path: str) -> str:
    return f"'{path}'" if path else "none"


def start_ray(config: ServeConfig) -> None:
    """Start Ray on this machine for a server, which listens through HAProxy if that is installed.

    Raises UserError if an option needs HAProxy and it is missing, CommandFailed if Ray does not
    start.
    """
    serve_environment.prepare_local_serving()
    asked = config.security.certificates
    if os.environ[serve_environment.HAPROXY] == "1":
        # Only HAProxy is reachable from other machines.
        os.environ[haproxy_config.HOST] = config.host
        os.environ[haproxy_config.BODY_TIMEOUT] = str(config.limits.body_timeout_s)
        os.environ.update(asked.environment() if asked else {})
    elif asked and asked.client_ca:
        raise UserError("security.tls_client_ca needs HAProxy, which is not available here.")
    # Seconds that a replica waits before it exits, for load balancers to stop using it. Here the
    # only one is HAProxy, which is updated within a second.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
    # Otherwise `serve run` starts Ray, with a dashboard and prestarted workers.
    connect.connect(num_cpus=config.replica_range[1] * config.threads)


def start_serve(config: ServeConfig, host: str, *, with_grpc: bool) -> None:
    """Start Serve with this server's addresses, unless it is running; `serve run` then reuses it.

    host: address of Serve's own servers, which may be loopback if HAProxy is in front of them.
    """
    by_haproxy = os.environ[serve_environment.HAPROXY] == "1"
    http = HTTPOptions(
        host=host,
        port=config.port,
        keep_alive_timeout_s=KEEP_ALIVE_S,
        ssl_certfile=None if by_haproxy else config.security.tls_cert,
        ssl_keyfile=None if by_haproxy else config.security.tls_key,
    )
    # Ray's own gRPC server has no TLS, so keys would be sent unencrypted.
    spoken = with_grpc and config.grpc_port and (by_haproxy or not config.security.tls_cert)
    functions = ["serve.grpc.service.add_to_server"] if spoken else []
    port = config.grpc_port or configs.GRPC_PORT
    serve.start(
        http_options=http,
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=functions),
    )


def check_bundles(state: ServingState, config: ServeConfig) -> LatencyModel:
    """Check the bundles and files that replicas need, so that errors appear before they start.

    Return the latency model of the default version's variant. Raises UserError if an option or a
    file is wrong, CorruptBundle if a bundle is.
    """
    for location in state.locations.values():
        manifest = Bundle.load(location).manifest
        accepted = rank_variants(manifest.variants, manifest.optimize_for)
        if config.variant is not None and config.variant not in accepted:
            raise UserError(
                f"variant '{config.variant}' is not an accepted variant of {config.model}; "
                f"expected one of {', '.join(accepted)}."
            )
        fields = [tensor.name for tensor in manifest.inputs]
        writer.check_log_fields(config.log, manifest.name, fields)
    if config.security.api_keys_file:
        KeyStore.load(config.security.api_keys_file)
    tracing.create_tracer(config.traces, "halyard")
    if given := config.security.certificates:
        try:
            given.read()
        except ValueError as error:
            raise UserError(f"security.tls_cert: {error}.") from error
    manifest = Bundle.load(state.locations[state.default]).manifest
    variant = manifest.variants[config.variant or manifest.default_variant]
    return LatencyModel.of(variant, config.threads)


def exit_with(error: Exception) -> NoReturn:
    """Print an error in one line and exit. Raises `error` instead if Ray runs this as a task."""
    if ray_internals.is_worker():
        raise error
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_FAILED if isinstance(error, CommandFailed) else EXIT_USER_ERROR)
