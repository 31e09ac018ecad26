"""Versions that are served side by side, and how the repository changes them."""

import asyncio
import contextlib
import gc
import json
import shutil
import weakref

import pytest

from cluster.errors import UserError
from serve.access import Actor
from serve.config import ServeConfig, validate_options
from serve.control import reconciler, state_publisher
from serve.control.repository import Repository
from serve.errors import BadRequest, NotFound, Unavailable
from serve.replica.model_versions import ModelVersions
from serve.replica.pipeline import PredictionPipeline
from serve.state import ServingState
from tests.serving import SCRATCH, make_plane
from train.bundle import Bundle, CorruptBundle, registry

ACTOR = Actor("team", "127.0.0.1", "r1")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(state_publisher, "POLL_S", 0.1)


@pytest.fixture
def place(bundle, tmp_path):
    """The bundle's location, and that of a copy whose self-test fails."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for variant in manifest["variants"].values():
        variant["golden_tolerance"] = -1.0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return str(bundle.path), str(copy)


def load(location, version):
    return make_plane(Bundle.load(location), version)


def state(revision, default, loaded=True, **locations):
    numbers = {name.removeprefix("v"): location for name, location in locations.items()}
    aliases = {"production": default}
    return ServingState(revision, "digits", default, numbers, aliases, loaded)


def make_versions(first):
    return ModelVersions(first, load, PredictionPipeline(ServeConfig(), "digits"))


def test_versions_are_found_by_number_and_alias(place):
    good, _ = place
    served = make_versions(state(0, "1", v1=good, v2=good))
    assert served.find("digits").plane.version == "1"
    assert served.find("digits", "2").plane.version == "2"
    assert served.find("digits", "production").plane.version == "1"
    for name, version in (("other", None), ("digits", "3"), ("digits", "../1")):
        with pytest.raises(NotFound):
            served.find(name, version)


def test_a_new_state_keeps_the_planes_of_kept_versions(place):
    async def scenario():
        good, _ = place
        served = make_versions(state(0, "1", v1=good))
        before = served.find("digits").plane
        await served.install(state(1, "2", v1=good, v2=good))
        assert served.find("digits", "1").plane is before
        assert served.find("digits").plane.version == "2"
        await served.install(state(2, "2", False, v1=good, v2=good))
        with pytest.raises(Unavailable, match="unloaded"):
            served.find("digits")
        assert not served.ready()

    asyncio.run(scenario())


def test_a_version_that_fails_its_self_test_changes_nothing(place):
    async def scenario():
        good, bad = place
        served = make_versions(state(0, "1", v1=good))
        before = served.find("digits").plane
        with pytest.raises(CorruptBundle):
            await served.install(state(1, "2", v2=bad))
        assert served.find("digits").plane is before
        assert served.state.revision == 0

    asyncio.run(scenario())


def make_repository(now, *others):
    """Return a repository whose registry gives each of the states in turn."""
    states = list(others)
    config = ServeConfig(storage=SCRATCH.name)
    return Repository(config, now, lambda config: states.pop(0))


@contextlib.asynccontextmanager
async def replica(kept, served):
    """Run a simulated replica: it follows the state, installs it and reports problems."""
    task = asyncio.create_task(_follow(kept, served))
    await asyncio.sleep(0)
    yield
    task.cancel()


async def _follow(kept, served):
    known, problem = served.state.id, None
    while True:
        new = await kept.follow("r", known, problem, {})
        if new is not None:
            known, problem = new.id, None
            try:
                await served.install(new)
            except CorruptBundle as error:
                problem = str(error)


def test_a_load_ends_when_every_replica_has_switched(place):
    async def scenario():
        good, _ = place
        served = make_versions(state(0, "1", v1=good))
        kept = make_repository(state(0, "1", v1=good), state(1, "2", v2=good))
        async with replica(kept, served):
            answer = await kept.load("digits", ACTOR)
            assert answer == {"name": "digits", "versions": ["2"], "default": "2"}
            assert served.find("digits").plane.version == "2"

    asyncio.run(scenario())


def test_loading_a_bad_version_is_refused_and_the_old_one_stays(place):
    async def scenario():
        good, bad = place
        kept = make_repository(state(0, "1", v1=good), state(1, "2", v2=bad))
        with pytest.raises(BadRequest, match="The previous versions are still served"):
            await kept.load("digits", ACTOR)
        assert (await kept.state()).revision == 0
        with pytest.raises(NotFound):
            await kept.load("other", ACTOR)

    asyncio.run(scenario())


def test_a_version_that_a_replica_cannot_serve_is_undone(place):
    async def scenario():
        good, bad = place
        served = make_versions(state(0, "1", v1=good))
        kept = make_repository(state(0, "1", v1=good), state(1, "2", v2=bad))
        # The repository's own check passes, but the replica's self-test fails.
        kept._reconciler._check_bundles = lambda locations: None
        async with replica(kept, served):
            with pytest.raises(BadRequest, match="golden"):
                await kept.load("digits", ACTOR)
        assert served.find("digits").plane.version == "1"
        assert (await kept.state()).default == "1"

    asyncio.run(scenario())


def test_replicas_do_not_change_the_repositorys_state(place):
    """Replicas of another deployment, which are being replaced, may have a later revision."""

    async def scenario():
        good, _ = place
        now = state(0, "1", v1=good)
        kept = make_repository(now)
        for incarnation, revision in (("another", 4), ("another", 0), (now.incarnation, 4)):
            assert await kept.follow("r", (incarnation, revision), None, {}) == now
        assert await kept.state() == now

    asyncio.run(scenario())


def test_an_earlier_problem_does_not_fail_the_next_change(place):
    async def scenario():
        good, bad = place
        served = make_versions(state(0, "1", v1=good))
        kept = make_repository(state(0, "1", v1=good), state(1, "2", v2=bad))
        kept._reconciler._check_bundles = lambda locations: None
        async with replica(kept, served):
            with pytest.raises(BadRequest):
                await kept.load("digits", ACTOR)
            await kept.unload("digits", ACTOR)
            assert not served.ready()

    asyncio.run(scenario())


def test_a_plane_that_is_no_longer_served_is_freed(place):
    async def scenario():
        good, _ = place
        served = make_versions(state(0, "1", v1=good))
        gone = weakref.ref(served.find("digits").plane)
        gc.disable()
        try:
            await served.install(state(1, "2", v2=good))
            assert gone() is None
        finally:
            gc.enable()

    asyncio.run(scenario())


def test_the_state_to_serve_is_resolved_from_the_registry(trained, storage_path):
    client = registry.mlflow_client(str(storage_path))
    version = str(client.get_model_version_by_alias("digits", "production").version)
    config = validate_options(
        {"model": trained["uri"], "extra_versions": "1", "storage": str(storage_path)}
    )
    found = reconciler.resolve_serving_state(config)
    assert found.default == version
    assert found.aliases == {"production": version}
    assert set(found.locations) == {version, "1"}
    with pytest.raises(UserError, match="nobody"):
        reconciler.resolve_serving_state(
            validate_options({"model": "models:/digits@nobody", "storage": str(storage_path)})
        )
