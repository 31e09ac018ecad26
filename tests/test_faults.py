"""Training that loses parts on its way ends as if it had not: real Ray, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests import server
from tests.test_end_to_end import processes
from train.loop.checkpoint import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]

OPTIONS = [
    *("--precision", "fp32", "--net.widths", "[16,32]", "--optim.epochs", "6"),
    *("--checkpoint.every_steps", "4", "--registry.enabled", "false"),
]
DEADLINE_S = 120


def start(root, *options):
    """Start the training command in the background; its output goes to a file."""
    log = (Path(root) / "log").open("w")
    return subprocess.Popen(
        [sys.executable, "train/main.py", "--storage.path", str(root), *OPTIONS, *options],
        cwd=server.REPOSITORY,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(condition, process=None):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process is None or process.poll() is None, "the command ended too soon"
        time.sleep(0.02)
    raise TimeoutError


def run_name(root):
    (folder,) = (Path(root) / "train").iterdir()
    return folder.name


def mid_epoch(root, at_least):
    """The last step that has a checkpoint, once it is `at_least`."""
    runs = list((Path(root) / "train").glob("*/checkpoints"))
    steps = Store(str(runs[0]), keep=2).steps() if runs else []
    return steps[-1] if steps and steps[-1] >= at_least else None


def weights(root):
    (file,) = (Path(root) / "bundles").glob("*/weights.safetensors")
    return safetensors.torch.load_file(file)


def assert_same(root, other):
    ours, theirs = weights(root), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    process = start(root)
    assert process.wait(DEADLINE_S) == 0, (root / "log").read_text()
    return root


def test_a_worker_killed_in_mid_epoch_leaves_no_trace_in_the_weights(undisturbed, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: mid_epoch(tmp_path, 30), process)
    workers = [pid for pid, command in processes().items() if "RayTrainWorker" in command]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert process.wait(DEADLINE_S) == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path, undisturbed)


def test_a_killed_driver_continues_on_one_worker_and_ends_the_same(undisturbed, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: mid_epoch(tmp_path, 30), process)
    before = processes()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not processes().keys() & before.keys())
    name = run_name(tmp_path)
    process = start(tmp_path, "--resume", name, "--workers.num", "1")
    assert process.wait(DEADLINE_S) == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path, undisturbed)

    process = start(tmp_path, "--resume", name, "--optim.lr", "0.05")
    assert process.wait(DEADLINE_S) == 2
    assert "optim.lr was 0.1, is 0.05" in (tmp_path / "log").read_text()
