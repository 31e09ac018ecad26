"""The Ray Serve application that `serve run serve.app` deploys."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster import connect, ray_internals, serve_environment
from cluster.errors import CommandFailed, UserError
from serve import bind, startup
from serve import config as configs
from serve.access import Guard
from serve.config import GatewayConfig, ServeConfig
from serve.control import autoscaling, reconciler, repository, state_publisher
from serve.control.repository_client import ModelClient, RepositoryClient
from serve.grpc import service
from serve.http import gateway, model_gateway
from serve.http.routes import ModelAPI
from serve.inference.dataplane import DataPlane
from serve.launch import (
    all_nodes_prepared,
    check_bundles,
    check_certificate_of_nodes,
    check_environment,
    exit_with,
    start_ray,
    start_serve,
)
from serve.replica.handler import InferenceHandler
from serve.replica.model_versions import ModelVersions
from serve.replica.pipeline import PredictionPipeline
from serve.rollout.aggregator import ReplicaReport
from serve.rollout.feedback_receiver import PUSH_INTERVAL_S
from serve.security import KeyStore
from serve.state import ServingState
from serve.telemetry import tracing
from serve.telemetry.access_log import AccessLog
from serve.telemetry.recorder import RequestRecorder
from train.bundle import Bundle, CorruptBundle, Predictor, registry
from train.bundle.mlflow_access import RegistryError

logger = logging.getLogger(__name__)

# Seconds that a replica keeps running for load balancers to stop using it: Ray waits 30 s.
DRAIN_S = 35
# Time limit of a replica's last calls before it exits, in seconds.
CLOSE_S = 2.0

# Seconds until the next call to the repository after a failed one.
ASK_AGAIN_S = 1.0

REPOSITORY = "repository"


class RepositoryDeployment(repository.Repository):
    """The repository as a deployment, which Serve closes with `__del__`."""

    def __init__(self, config: ServeConfig, state: ServingState) -> None:
        super().__init__(config, state)
        # The first access to the registry takes seconds of CPU time. Do it while replicas start.
        threading.Thread(target=self._look, args=(config, state.name), daemon=True).start()

    @staticmethod
    def _look(config: ServeConfig, name: str) -> None:
        with contextlib.suppress(RegistryError):  # a later access reports it
            registry.alias_versions(config.storage, name)

    async def __del__(self) -> None:
        await self.close()


# One instance for all replicas of a model.
Repository = serve.deployment(RepositoryDeployment).options(
    name=REPOSITORY, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
)


@serve.ingress()
@service.answers_grpc
class ModelDeployment:
    """One replica of a model. It is ready once its golden self-test has passed."""

    async def __init__(self, config: ServeConfig, handle: DeploymentHandle) -> None:  # type: ignore[misc]
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._config = config
        configs.set_bundle_policy(config.plugins, config.storage, config.security.require_signature)
        self._repository = RepositoryClient(handle)
        state = await self._repository.state()
        self._name = state.name
        self._pipeline = PredictionPipeline(config, state.name)
        self._served = await asyncio.to_thread(ModelVersions, state, self._load, self._pipeline)
        self._busy = autoscaling.Utilization(
            self._served.engine_s, self._served.num_responses, self._served.num_refused
        )
        keys = (
            KeyStore.load(config.security.api_keys_file) if config.security.api_keys_file else None
        )
        loopback = all(map(bind.is_loopback, (config.host, await bind.http_host())))
        handler = InferenceHandler(self._served, config, self._repository, keys, loopback=loopback)
        file = (
            ray_internals.session_log_folder()
            / "serve"
            / f"access_{state.name}_{self._replica}.jsonl"
        )
        recorder = RequestRecorder(
            AccessLog(file, config.access_log), tracing.create_tracer(config.traces, "halyard")
        )
        self._rest = ModelAPI(handler, recorder)
        self._background = [asyncio.create_task(each) for each in (self._follow(), self._push())]
        gateway.register_app(self._rest)
        service.local = service.InferenceService(handler, recorder)

    def __serve_build_asgi_app__(self) -> gateway.ProxyConnection:
        # For requests that arrive through Ray's own proxy.
        return gateway.ProxyConnection(self._rest)

    async def __del__(self) -> None:
        # Serve awaits this once no request is in progress.
        for task in self._background:
            task.cancel()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await self._send(self._served.report())
                await self._repository.leave(self._replica)
        await self._served.close()

    async def forward(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Handle a request that the gateway forwards. Return status, headers and body."""
        return await model_gateway.call_app(self._rest, method, path, headers, body)

    async def describe(self) -> dict[str, str]:
        """Return the "version" and "variant" that requests use by default."""
        plane = self._served.find(self._served.name).plane
        return {"version": plane.version, "variant": plane.variant}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the rows in progress and the utilization; Ray Serve calls this regularly."""
        return {
            autoscaling.ROWS: self._served.load(),
            autoscaling.BUSY: self._busy.share(),
        }

    def _load(self, location: str, version: str) -> DataPlane:
        config = self._config
        bundle = Bundle.load(location)
        if bundle.manifest.name != self._name:
            raise CorruptBundle(
                f"'{location}' is of model '{bundle.manifest.name}'; expected '{self._name}'."
            )
        predictor = Predictor.load_fastest(bundle, config.variant, num_threads=config.threads)
        plane = DataPlane(predictor, version, config)
        plane.warm_up()
        return plane

    async def _push(self) -> None:
        """Send the replica's observations to the repository, soon after they are made."""
        while True:
            await self._pipeline.reports.wait(state_publisher.POLL_S)
            report = self._served.report()
            while not await self._send(report):
                await asyncio.sleep(state_publisher.POLL_S)
            await asyncio.sleep(PUSH_INTERVAL_S)

    async def _send(self, report: ReplicaReport) -> bool:
        """Send a report to the repository; return whether that succeeded."""
        try:
            if not report.is_empty():
                await self._repository.collect(report)
        except Exception:
            logger.exception("a report could not be sent to the repository; trying again")
            return False
        return True

    async def _follow(self) -> None:
        """Install each state that the repository publishes, and send metrics to the repository."""
        known, problem = self._served.state.id, None
        while True:
            try:
                metrics = self._rest.snapshot(self._replica)
                state = await self._repository.follow(self._replica, known, problem, metrics)
            except Exception:
                logger.exception("the repository did not respond; trying again")
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            if state is not None:
                known, problem = state.id, await self._install(state)

    async def _install(self, state: ServingState) -> str | None:
        """Install a state. Return why that failed, or None if it succeeded."""
        installing = asyncio.ensure_future(self._served.install(state))
        while not (await asyncio.wait({installing}, timeout=state_publisher.POLL_S))[0]:
            with contextlib.suppress(Exception):
                await self._repository.keep_alive(self._replica)
        error = installing.exception()
        if error is None:
            return None
        logger.error("revision %d of the state cannot be served: %s", state.revision, error)
        return str(error) if isinstance(error, CorruptBundle) else "a replica could not load it."


@serve.ingress()
class GatewayDeployment:
    """The gateway of a server with several models."""

    async def __init__(self, config: GatewayConfig) -> None:  # type: ignore[misc]
        guard = Guard(
            KeyStore.load(config.security.api_keys_file) if config.security.api_keys_file else None,
            loopback=bind.is_loopback(await bind.http_host()),
            metrics_without_key=config.security.metrics_without_key,
            hosts=config.security.allowed_hosts,
        )
        self._gateway = model_gateway.ModelGateway(
            lambda name: ModelClient(serve.get_app_handle(name)),
            lambda name: RepositoryClient(serve.get_deployment_handle(REPOSITORY, name)),
            guard,
            config,
        )
        gateway.register_app(self._gateway)

    def __serve_build_asgi_app__(self) -> gateway.ProxyConnection:
        return gateway.ProxyConnection(self._gateway)


# Ray Serve passes the key=value arguments of `serve run` to a function with one parameter.
def app(arguments: dict[str, str]) -> serve.Application:
    """Find the model in the registry, check its bundle, and return the application."""
    # Hide the messages of `serve run` about each of its steps; `startup` prints what users need.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        check_environment()
        config = configs.validate_options(arguments)
        configs.set_bundle_policy(config.plugins, config.storage, config.security.require_signature)
        state = reconciler.resolve_serving_state(config)
        profile = check_bundles(state, config)
        joined = ray.is_initialized() or connect.join_running()
        if joined and not ray_internals.is_worker():
            check_certificate_of_nodes(config)
        if not joined:
            for port in filter(None, (config.port, config.grpc_port)):
                connect.check_port_free(config.host, port)
            start_ray(config)
    except (UserError, CorruptBundle, CommandFailed) as error:
        exit_with(error)
    if not ray_internals.is_worker():
        inside = not joined and os.environ[serve_environment.HAPROXY] == "1"
        startup.end_on_signals()
        host = connect.LOOPBACK[0] if inside else config.host
        start_serve(config, host, with_grpc=not joined or all_nodes_prepared())
        startup.announce_server(config, state.name, state.default)
    deployment = serve.deployment(ModelDeployment).options(
        name=state.name,
        # The data plane's own queue decides which requests wait and which are rejected.
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": config.threads},
        # After draining, a replica waits for the requests that are still in progress.
        graceful_shutdown_timeout_s=DRAIN_S
        + config.limits.timeout_s
        + config.limits.body_timeout_s,
        # A single replica stops only once its successor is ready, if there is room for both.
        max_surge_percent=100 if config.replica_range == (1, 1) else 0,
        **autoscaling.scaling_options(config, profile),
    )
    options = config.of_a_replica
    return deployment.bind(options, Repository.bind(options, state))


def multi_model_app(arguments: dict[str, Any]) -> serve.Application:
    """Return the gateway of several models; see serve/configs/multi.yaml."""
    try:
        check_environment()
        config = configs.validate_gateway_options(arguments)
        if config.security.api_keys_file:
            KeyStore.load(config.security.api_keys_file)
    except UserError as error:
        exit_with(error)
    options = {"num_cpus": 0}
    return (
        serve.deployment(GatewayDeployment)
        .options(name="gateway", max_ongoing_requests=100_000, ray_actor_options=options)
        .bind(config)
    )
