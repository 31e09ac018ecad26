"""Helpers for the tests of serving: the parts of a replica, without Ray."""

import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from serve.config import ServeConfig
from serve.control.repository import Repository
from serve.http.routes import ModelAPI
from serve.inference.dataplane import DataPlane
from serve.replica.handler import InferenceHandler
from serve.replica.model_versions import ModelVersions
from serve.replica.pipeline import PredictionPipeline
from serve.security import KeyStore
from serve.state import ServingState
from serve.telemetry.recorder import RequestRecorder
from train.bundle import Bundle, Predictor

# The storage of repositories in tests that give no other.
SCRATCH = tempfile.TemporaryDirectory()


def make_plane(bundle: Bundle, version: str = "3", **options: Any) -> DataPlane:
    return DataPlane(Predictor.load(bundle), version, ServeConfig(**options))


def make_host(
    bundle: Bundle,
    *,
    keys: KeyStore | None = None,
    loopback: bool = True,
    load: Callable[[str], Predictor] = lambda location: Predictor.load(Bundle.load(location)),
    **options: Any,
) -> InferenceHandler:
    """Return the handler of a model with version 3, alias production, and its repository.

    load: location of a bundle → its predictor.
    """
    options.setdefault("storage", SCRATCH.name)
    config = ServeConfig(model=str(bundle.path), **options)
    name = bundle.manifest.name
    state = ServingState(0, name, "3", {"3": str(bundle.path)}, {"production": "3"})

    def load_plane(location: str, version: str) -> DataPlane:
        return DataPlane(load(location), version, config)

    repository = Repository(config, state, lambda _config: state)
    return InferenceHandler(
        ModelVersions(state, load_plane, PredictionPipeline(config, name)),
        config,
        repository,
        keys,
        loopback=loopback,
    )


def make_rest(bundle: Bundle, recorder: RequestRecorder | None = None, **options: Any) -> ModelAPI:
    return ModelAPI(make_host(bundle, **options), recorder)


@contextmanager
def listening(application: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port of this machine; yield its URL."""
    # The socket listens before the server starts: a client that connects early waits.
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client_of(application: Any) -> TestClient:
    """Return a client that requests 127.0.0.1:8000, like a client on the server's machine."""
    return TestClient(application, base_url="http://127.0.0.1:8000")
