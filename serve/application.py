"""The Ray Serve application: what `serve run serve.app` deploys."""

import socket
import sys
from typing import NoReturn

import ray
from ray import serve
from ray._private.worker import global_worker
from starlette.applications import Starlette

from cluster import connect, storage
from cluster.errors import EXIT_USER_ERROR, UserError
from serve import config as configs
from serve.config import ServeConfig
from serve.dataplane import DataPlane
from serve.protocol import rest
from train.bundle import Bundle, CorruptBundle, Predictor, registry

HOST, PORT = "127.0.0.1", 8000


@serve.ingress()
class Model:
    """One replica of a model. Ready once its golden self-test has passed."""

    def __init__(self, location: str, version: str, config: ServeConfig) -> None:
        bundle = Bundle.load(location)
        predictor = Predictor.load(bundle, config.variant, num_threads=config.threads)
        self._plane = DataPlane(predictor, version, config)
        self._config = config

    def __serve_build_asgi_app__(self) -> Starlette:
        return rest.build(self._plane, self._config)


# Ray Serve hands the key=value arguments to a function of one parameter.
def app(arguments: dict[str, str]) -> serve.Application:
    """Find the model in the registry, check its bundle, and return the application."""
    try:
        config = configs.validate(arguments)
        location, version = registry.resolve(config.model, storage.resolve(config.storage))
        bundle = Bundle.load(location)
        _check_variant(bundle, config)
        joined = ray.is_initialized() or connect.join_running()
        if not joined:
            _check_port()
    except (UserError, CorruptBundle) as error:
        _refuse(error)
    if not joined:
        # `serve run` would start Ray too, with a dashboard and workers ahead of need.
        connect.connect(num_cpus=config.replicas * config.threads)
    deployment = serve.deployment(Model).options(
        name=bundle.manifest.name,
        num_replicas=config.replicas,
        # The data plane's own queue decides what waits and what is refused.
        max_ongoing_requests=config.max_queue_rows + config.max_batch_rows,
        ray_actor_options={"num_cpus": config.threads},
    )
    return deployment.bind(location, version, config)


def _check_variant(bundle: Bundle, config: ServeConfig) -> None:
    accepted = [name for name, variant in bundle.manifest.variants.items() if variant.accepted]
    if config.variant is not None and config.variant not in accepted:
        raise UserError(
            f"variant '{config.variant}' is not an accepted variant of {config.model}; "
            f"accepted are {', '.join(accepted)}."
        )


def _check_port() -> None:
    """Raises UserError if something listens where the server will."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, PORT))
        except OSError:
            raise UserError(
                f"port {PORT} is taken by another program; stop that one first "
                f"(ss -ltnp 'sport = :{PORT}' names it)."
            ) from None


def _refuse(error: Exception) -> NoReturn:
    """End `serve run` with one line; fail the build where Ray runs it as a task."""
    if global_worker.mode == ray.WORKER_MODE:
        raise error
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
