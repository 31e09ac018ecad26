"""The Ray Serve application: what `serve run serve.app` deploys."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray import serve
from ray._private.worker import global_worker
from ray.exceptions import RayTaskError
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.handle import DeploymentHandle

from cluster import ask, connect, haproxy_config, ingress, probe
from cluster.errors import EXIT_USER_ERROR, UserError
from serve import autoscale, bind, front, gateway, repository, startup, tracing
from serve import config as configs
from serve.access import Guard
from serve.accesslog import AccessLog
from serve.config import FrontConfig, ServeConfig
from serve.dataplane import DataPlane
from serve.errors import RequestError
from serve.host import Host
from serve.monitor import requestlog
from serve.profile import Profile
from serve.protocol import grpc
from serve.protocol.rest import Rest
from serve.security import Keys
from serve.served import Served, State
from train.bundle import Bundle, CorruptBundle, Predictor
from train.bundle.manifest import ranked

logger = logging.getLogger(__name__)

# Serve's own loopback connections to a replica live longer than HAProxy leaves them idle.
KEEP_ALIVE_S = 120
DRAIN_S = 35
# What a node of a busy cluster may take to answer.
ASK_S = 30.0


REPOSITORY = "repository"


class KeptRepository(repository.Repository):
    """The repository, as Serve ends it."""

    async def __del__(self) -> None:
        await self.conductor.close()


# One for all replicas of a model.
Repository = serve.deployment(KeptRepository).options(
    name=REPOSITORY, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
)


class Follower:
    """The repository, as a replica asks it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Any]:
        async def call(*arguments: Any) -> Any:
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except RayTaskError as error:
                # Ray adds its traceback to the message; the cause has the words for a client.
                raise error.cause if isinstance(error.cause, RequestError) else error from None

        return call


@serve.ingress()
@grpc.answers_grpc
class Model:
    """One replica of a model. Ready once its golden self-test has passed."""

    async def __init__(self, config: ServeConfig, handle: DeploymentHandle) -> None:  # type: ignore[misc]
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._config = config
        configs.allow(config.plugins, config.storage)
        self._repository = Follower(handle)
        state: State = await self._repository.state()
        self._name = state.name
        self._served = await asyncio.to_thread(Served, state, self._load)
        self._busy = autoscale.Busy(self._served.engine_s, self._served.answers)
        keys = Keys.load(config.keys) if config.keys else None
        loopback = all(map(bind.is_loopback, (config.host, await bind.http_host())))
        host = self._host = Host(self._served, config, self._repository, keys, loopback=loopback)
        log = AccessLog(_logs() / f"access_{state.name}_{self._replica}.jsonl", config.access_log)
        self._rest = Rest(host, log=log, tracer=tracing.tracer(config.traces, "halyard"))
        self._following = asyncio.get_running_loop().create_task(self._follow())
        gateway.register(self._rest)
        grpc.local = grpc.InferenceService(host, self._rest.metrics, log)

    def __serve_build_asgi_app__(self) -> gateway.Proxied:
        # For what comes by way of Ray's own proxy.
        return gateway.Proxied(self._rest)

    async def __del__(self) -> None:
        # Serve awaits it, once no request is under way.
        await self._host.close()

    async def forward(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Answer a request that the front has taken; (status, headers, body)."""
        return await front.call(self._rest, method, path, headers, body)

    async def describe(self) -> dict[str, str]:
        """Name the version and the variant that answer by default."""
        plane = self._served.find(self._served.name)
        return {"version": plane.version, "variant": plane.variant}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {autoscale.ROWS: float(self._served.rows()), autoscale.BUSY: self._busy.share()}

    def _load(self, location: str, version: str) -> DataPlane:
        config = self._config
        bundle = Bundle.load(location)
        if bundle.manifest.name != self._name:
            raise CorruptBundle(f"'{location}' is of model '{bundle.manifest.name}'.")
        predictor = Predictor.load(bundle, config.variant, num_threads=config.threads)
        plane = DataPlane(predictor, version, config)
        plane.warm_up()
        return plane

    async def _follow(self) -> None:
        """Serve what the repository says, and tell it what was counted."""
        served, revision, problem = self._served, self._served.state.revision, None
        while True:
            try:
                metrics = self._rest.snapshot(self._replica)
                state = await self._repository.follow(
                    self._replica, served.state, revision, problem, metrics, self._host.report()
                )
            except Exception:
                logger.exception("the repository could not be asked; asking again")
                await asyncio.sleep(repository.POLL_S)
                continue
            if state is not None:
                revision, problem = state.revision, await self._gone_over(state)

    async def _gone_over(self, state: State) -> str | None:
        """Go over to a state; return why that was not possible."""
        installing = asyncio.ensure_future(self._served.install(state))
        while not (await asyncio.wait({installing}, timeout=repository.POLL_S))[0]:
            with contextlib.suppress(Exception):
                await self._repository.beat(self._replica, self._host.report())
        error = installing.exception()
        if error is None:
            return None
        logger.error("revision %d cannot be served: %s", state.revision, error)
        return str(error) if isinstance(error, CorruptBundle) else "a replica could not load it."


@serve.ingress()
class Front:
    """What belongs to none of several models."""

    async def __init__(self, config: FrontConfig) -> None:  # type: ignore[misc]
        guard = Guard(
            Keys.load(config.keys) if config.keys else None,
            loopback=bind.is_loopback(await bind.http_host()),
            open_metrics=config.open_metrics,
            hosts=config.security.allowed_hosts,
        )
        self._front = front.Front(
            lambda name: Follower(serve.get_app_handle(name)),
            lambda name: Follower(serve.get_deployment_handle(REPOSITORY, name)),
            guard,
            config,
        )
        gateway.register(self._front)

    def __serve_build_asgi_app__(self) -> gateway.Proxied:
        return gateway.Proxied(self._front)


# Ray Serve hands the key=value arguments to a function of one parameter.
def app(arguments: dict[str, str]) -> serve.Application:
    """Find the model in the registry, check its bundle, and return the application."""
    # What `serve run` says at each of its steps; what matters to a user is said by `startup`.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _check_environment()
        config = configs.validate(arguments)
        configs.allow(config.plugins, config.storage)
        state = repository.resolve(config)
        profile = _check(state, config)
        joined = ray.is_initialized() or connect.join_running()
        if joined and config.tls_cert:
            raise UserError(
                "tls_cert is for a server that starts Ray itself; on a cluster, let the gateway "
                "before it speak TLS."
            )
        if not joined:
            for port in filter(None, (config.port, config.grpc_port)):
                _check_port(config.host, port)
    except (UserError, CorruptBundle) as error:
        _refuse(error)
    if not joined:
        if config.tls_cert:
            # HAProxy as Ray sets it up speaks no TLS; Ray's own proxy does.
            os.environ[ingress.HAPROXY] = "0"
        ingress.prepare()
        if os.environ[ingress.HAPROXY] == "1":
            # Nothing but HAProxy listens to other machines.
            os.environ[haproxy_config.HOST] = config.host
        # Replicas wait that long for load balancers to look elsewhere. Here there is only HAProxy,
        # which is told within a second.
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2")
        # `serve run` would start Ray too, with a dashboard and workers ahead of need.
        connect.connect(num_cpus=config.replica_range[1] * config.threads)
    if global_worker.mode != ray.WORKER_MODE:
        inside = not joined and os.environ[ingress.HAPROXY] == "1"
        startup.end_on_signals()
        host = connect.LOOPBACK[0] if inside else config.host
        _start(config, host, with_grpc=not joined or _prepared())
        startup.announce(config, state.name, state.default)
    deployment = serve.deployment(Model).options(
        name=state.name,
        # The data plane's own queue decides what waits and what is refused.
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": config.threads},
        # A single replica goes only once its successor answers, if there is room for both.
        # Ray waits 30 s for load balancers to look elsewhere; then for what is still under way.
        graceful_shutdown_timeout_s=DRAIN_S + config.timeout_s + config.body_timeout_s,
        max_surge_percent=100 if config.replica_range == (1, 1) else 0,
        **autoscale.options(config, profile),
    )
    options = config.of_a_replica
    return deployment.bind(options, Repository.bind(options, state))


def several(arguments: dict[str, Any]) -> serve.Application:
    """Return the front of several models; see serve/configs/multi.yaml."""
    try:
        _check_environment()
        config = configs.validate_front(arguments)
        if config.keys:
            Keys.load(config.keys)
    except UserError as error:
        _refuse(error)
    options = {"num_cpus": 0}
    return (
        serve.deployment(Front)
        .options(name="front", max_ongoing_requests=100_000, ray_actor_options=options)
        .bind(config)
    )


def _logs() -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path(), "serve")


def _check_environment() -> None:
    """Raises UserError where this is a node of a cluster that lacks the server's environment.

    There Ray's proxies would listen on all interfaces.
    """
    if global_worker.mode == ray.WORKER_MODE and not probe.gateway():
        raise UserError(
            "Ray was started without the server's environment. Before it starts, run: "
            "source <(python -m serve.environment)"
        )


def _prepared() -> bool:
    """Whether every node was started with the server's environment; say on stderr what is not.

    Elsewhere Ray's own proxy serves, and its gRPC listens on all interfaces.
    """
    nodes = ask.each_node(ask.alive(), probe.gateway, timeout_s=ASK_S)
    missing = sorted(address for address, (gateway, _) in nodes.items() if not gateway)
    if missing:
        print(
            f"serving without HAProxy and gRPC: Ray was started on {', '.join(missing)} without "
            "the lines of `python -m serve.environment`.",
            file=sys.stderr,
        )
    return not missing


def _start(config: ServeConfig, host: str, *, with_grpc: bool) -> None:
    """Start Serve with this server's addresses, unless it runs; `serve run` finds it started.

    host: of Serve's own servers, which may stay on loopback behind HAProxy.
    """
    http = HTTPOptions(
        host=host,
        port=config.port,
        keep_alive_timeout_s=KEEP_ALIVE_S,
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
    )
    # Ray's gRPC speaks no TLS: keys would travel in the clear.
    spoken = with_grpc and config.grpc_port and not config.tls_cert
    functions = ["serve.protocol.grpc.add_to_server"] if spoken else []
    port = config.grpc_port or configs.GRPC_PORT
    serve.start(
        http_options=http,
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=functions),
    )


def _check(state: State, config: ServeConfig) -> Profile:
    """Check what each replica will; return the profile of the default version's variant.

    Raises UserError, CorruptBundle.
    """
    for location in state.locations.values():
        manifest = Bundle.load(location).manifest
        accepted = ranked(manifest.variants, manifest.optimize_for)
        if config.variant is not None and config.variant not in accepted:
            raise UserError(
                f"variant '{config.variant}' is not an accepted variant of {config.model}; "
                f"accepted are {', '.join(accepted)}."
            )
        fields = [tensor.name for tensor in manifest.inputs]
        requestlog.check(requestlog.options(config), manifest.name, fields)
    if config.keys:
        Keys.load(config.keys)
    tracing.tracer(config.traces, "halyard")
    for path in (config.tls_cert, config.tls_key):
        if path is not None and not Path(path).is_file():
            raise UserError(f"'{path}' is not a file; expected one in PEM format.")
    manifest = Bundle.load(state.locations[state.default]).manifest
    variant = manifest.variants[config.variant or manifest.default_variant]
    return Profile.of(variant, config.threads)


def _check_port(host: str, port: int) -> None:
    """Raises UserError if something listens where the server will."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            raise UserError(
                f"port {port} is taken by another program; stop that one first "
                f"(ss -ltnp 'sport = :{port}' names it)."
            ) from None


def _refuse(error: Exception) -> NoReturn:
    """End `serve run` with one line; fail the build where Ray runs it as a task."""
    if global_worker.mode == ray.WORKER_MODE:
        raise error
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
