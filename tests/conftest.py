"""Shared fixtures: data that trains in seconds, and one bundle that is trained on it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster import connect
from cluster.cli import run_command
from tests.server import REPOSITORY
from train.bundle import Bundle
from train.config import Config, validate_config
from train.data import dataset
from train.data.dataset import EncodedDataset
from train.tasks import Record

connect.set_ray_environment()
# No test depends on encoders that happen to be on this machine.
os.environ["HALYARD_PRETRAINED"] = ""

CONFIG: dict[str, Any] = {
    "name": "digits",
    "task_type": "classification",
    "features": {"image": "image"},
    "data": {"train": "sklearn:digits"},
    "net": {"widths": [16, 32]},
    "optim": {"epochs": 2, "batch_size": 64},
    "precision": "fp32",
}


# The files that take longest come first, so that processes that share the tests end together.
LONGEST = (
    "tune/test_search.py",
    "docs/test_commands.py",
    "train/bundle/test_registry.py",
    "train/distributed/test_faults.py",
    "cluster/test_commit.py",
    "docs/test_notebook.py",
    "serve/rollout/test_monitor.py",
    "test_end_to_end.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    places = {REPOSITORY / "tests" / file: place for place, file in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (places.get(item.path, len(LONGEST)), item.path not in slow))


def make_config(**changes: Any) -> Config:
    """Return the config of a small run on digits, with top-level fields changed."""
    return validate_config({**CONFIG, **changes})


@pytest.fixture(scope="session")
def storage_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def config(storage_path: Path) -> Config:
    return make_config(storage={"path": str(storage_path)})


@pytest.fixture(scope="session")
def digits(config: Config) -> EncodedDataset:
    return dataset.prepare_dataset(config, config.storage.path)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """Ray in this process, for the tests of one module."""
    connect.set_ray_environment()
    import ray

    assert not ray.is_initialized(), "an earlier test left Ray running; use the fixture ray_session"
    connect.connect(num_cpus=4, metrics=False)
    yield
    connect.disconnect()


@pytest.fixture(scope="session")
def trained(storage_path: Path) -> dict[str, Any]:
    """The result of `python train/main.py`: digits, two workers, registered as production."""
    small = [
        "--optim.epochs",
        "8",
        "--net.widths",
        "[32,64]",
        "--compress.max_accuracy_drop",
        "0.02",
    ]
    done = run_main(["--storage.path", str(storage_path), *small])
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="session")
def bundle(trained: dict[str, Any]) -> Bundle:
    return Bundle.load(trained["bundle"])


# Short benchmarks, because no test reads their timings.
QUICK = ("--compress.measure_seconds", "0.2")


def run_main(arguments: Sequence[str], script: str = "train/main.py") -> Any:
    """Run a command as a user does, from the repository."""
    return subprocess.run(
        [sys.executable, script, *QUICK, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def call_command(
    main: Callable[[Sequence[str]], dict[str, Any] | None],
    arguments: Sequence[str],
    patch: pytest.MonkeyPatch,
) -> int:
    """Run a command's `main` in this process, from the repository; return its exit status.

    It prints what the command prints, which capfd captures. If it starts Ray, Ray is stopped. Use
    `run_main` where a test is about the process itself.
    """
    import ray

    joined = ray.is_initialized()
    patch.setattr("sys.argv", ["command", *arguments])
    patch.chdir(REPOSITORY)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            run_command(main)
    finally:
        signal.signal(signal.SIGTERM, handler)
        if not joined:
            connect.disconnect()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[[Sequence[Record], str], str]:
    """Write records to a Parquet file and return its path."""

    def write(records: Sequence[Record], name: str = "data.parquet") -> str:
        path = tmp_path / name
        pyarrow.parquet.write_table(pa.Table.from_pylist([dict(row) for row in records]), path)
        return str(path)

    return write


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
