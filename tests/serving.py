"""What the tests of serving share: a replica's inside, without Ray."""

from collections.abc import Callable
from typing import Any

from starlette.testclient import TestClient

from serve.config import ServeConfig
from serve.dataplane import DataPlane
from serve.host import Host
from serve.protocol.rest import Rest
from serve.repository import Repository
from serve.security import Keys
from serve.served import Served, State
from train.bundle import Bundle, Predictor


def make_plane(bundle: Bundle, version: str = "3", **options: Any) -> DataPlane:
    return DataPlane(Predictor.load(bundle), version, ServeConfig(**options))


def make_host(
    bundle: Bundle,
    *,
    keys: Keys | None = None,
    loopback: bool = True,
    load: Callable[[str], Predictor] = lambda location: Predictor.load(Bundle.load(location)),
    **options: Any,
) -> Host:
    """A model in version 3, alias production, with its repository.

    load: location of a bundle → its predictor.
    """
    config = ServeConfig(model=str(bundle.path), **options)
    name = bundle.manifest.name
    state = State(0, name, "3", {"3": str(bundle.path)}, {"production": "3"})

    def load_plane(location: str, version: str) -> DataPlane:
        return DataPlane(load(location), version, config)

    repository = Repository(config, state, lambda _config, _revision: state)
    return Host(Served(state, load_plane), config, repository, keys, loopback=loopback)


def make_rest(bundle: Bundle, **options: Any) -> Rest:
    return Rest(make_host(bundle, **options))


def client_of(application: Any) -> TestClient:
    """A client that asks by the server's address, as one on its machine does."""
    return TestClient(application, base_url="http://127.0.0.1:8000")
