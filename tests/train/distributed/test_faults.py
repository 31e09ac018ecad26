"""Training on real Ray with killed processes and nodes, against an undisturbed run."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from ray.cluster_utils import Cluster

from tests import server
from tests.conftest import QUICK
from tests.gloo import run_workers
from tests.test_end_to_end import processes
from train.cli import parse
from train.data import batch_sampler, dataset
from train.loop.checkpoint import CheckpointManager, load_best_weights
from train.loop.loop import Loop

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 6
OPTIONS = [
    *("--precision", "fp32", "--net.widths", "[16,32]", "--optim.epochs", str(EPOCHS)),
    *("--checkpoint.every_steps", "4", "--registry.enabled", "false"),
    *QUICK,
]
DEADLINE_S = 120


def start(root, *options, address=None, log=None, **environment):
    """Start the training command in the background; its output goes to a file."""
    # On SIGABRT the command prints the stacks of its threads.
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", **environment}
    environment |= {"RAY_ADDRESS": address} if address else {}
    log = (log or Path(root) / "log").open("w")
    return subprocess.Popen(
        [sys.executable, "train/main.py", "--storage.path", str(root), *OPTIONS, *options],
        cwd=server.REPOSITORY,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def exit_code(process, root, within_s=DEADLINE_S):
    """Wait for a command to end and return its exit code; fail with its output and stacks."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.wait(DEADLINE_S)
        pytest.fail(f"still running after {within_s} s:\n{(Path(root) / 'log').read_text()}")


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
    """Return the last step with a checkpoint if it is `at_least`, else None."""
    runs = list((Path(root) / "train").glob("*/checkpoints"))
    steps = CheckpointManager(str(runs[0]), keep=2).steps() if runs else []
    return steps[-1] if steps and steps[-1] >= at_least else None


def reference(worker, config, data, folder):
    Loop(config, data, worker, CheckpointManager(str(folder), keep=1), num_micro_batches=2).run()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function of the epochs: weights of the same run in this process, without Ray or faults."""

    @cache
    def run(epochs):
        root = tmp_path_factory.mktemp("undisturbed")
        config = parse([*OPTIONS, "--optim.epochs", str(epochs)]).config
        run_workers(1, reference, config, dataset.prepare_dataset(config, str(root)), root / "run")
        return load_best_weights(CheckpointManager(str(root / "run"), keep=1))[0]

    return run


def assert_same(root, expected):
    (file,) = (Path(root) / "bundles").glob("*/weights.safetensors")
    weights = safetensors.torch.load_file(file)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_a_worker_killed_in_mid_epoch_does_not_change_weights(undisturbed, tmp_path):
    others = processes()
    process = start(tmp_path)
    wait_for(lambda: mid_epoch(tmp_path, 30), process)
    started = {pid: command for pid, command in processes().items() if pid not in others}
    workers = [pid for pid, command in started.items() if "RayTrainWorker" in command]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert exit_code(process, tmp_path) == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path, undisturbed(EPOCHS))


def test_a_killed_driver_resumes_on_one_worker_and_ends_the_same(undisturbed, tmp_path):
    others = processes()
    process = start(tmp_path)
    wait_for(lambda: mid_epoch(tmp_path, 30), process)
    started = processes().keys() - others.keys()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not processes().keys() & started)
    name = run_name(tmp_path)
    process = start(tmp_path, "--resume", name, "--workers.num", "1")
    assert exit_code(process, tmp_path) == 0, (tmp_path / "log").read_text()
    assert_same(tmp_path, undisturbed(EPOCHS))

    process = start(tmp_path, "--resume", name, "--optim.lr", "0.05")
    assert exit_code(process, tmp_path) == 2
    assert "optim.lr was 0.1, is 0.05" in (tmp_path / "log").read_text()


def test_an_error_in_user_code_is_not_retried(tmp_path):
    mistakes = tmp_path / "mistakes"
    options = ["--net.class_path", "tests.fragile:Mistaken", "--workers.num", "2"]
    process = start(tmp_path, *options, MISTAKES=str(mistakes), PYTHONPATH=str(server.REPOSITORY))
    assert exit_code(process, tmp_path) == 1
    # At most once by each worker.
    assert len(mistakes.read_text().splitlines()) <= 2
    log = (tmp_path / "log").read_text()
    words = "training failed and would fail again: KeyError: 'no such key'. Fix the cause, then "
    assert f"{words}continue with --resume {run_name(tmp_path)};" in log


def test_a_run_waits_for_cpus_or_refuses_impossible_requests(tmp_path):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    places = [tmp_path / name for name in ("too_many", "first", "second")]
    for place in places:
        place.mkdir()
    too_many, first, second = places
    try:
        process = start(too_many, "--workers.num", "3", address=cluster.address)
        assert exit_code(process, too_many) == 2
        options = ("--workers.num", "1", "--optim.epochs", "10000")
        busy = start(first, *options, address=cluster.address)
        wait_for(lambda: mid_epoch(first, 4), busy)
        waiting = start(second, "--workers.num", "2", address=cluster.address)
        wait_for(lambda: "waiting for 2 workers" in (second / "log").read_text(), waiting)
        os.killpg(busy.pid, signal.SIGTERM)
        assert exit_code(waiting, second) == 0, (second / "log").read_text()
    finally:
        cluster.shutdown()
    assert (
        "the cluster has 2 CPU and 0 GPU on 1 nodes, enough for 2" in (too_many / "log").read_text()
    )
    assert "each with 1 CPU; free now: 1 CPU" in (second / "log").read_text()


@pytest.mark.chaos
def test_a_run_survives_a_lost_node_and_grows_with_a_new_one(undisturbed, tmp_path):
    epochs = 200  # Ray looks for new nodes every 20 s
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        options = ("--workers.num", "[1,2]", "--optim.epochs", str(epochs))
        process = start(tmp_path, *options, address=cluster.address)
        wait_for(lambda: mid_epoch(tmp_path, 50), process)
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_for(lambda: "training on 1 worker" in (tmp_path / "log").read_text(), process)
        cluster.add_node(num_cpus=1)
        assert exit_code(process, tmp_path, 2 * DEADLINE_S) == 0, (tmp_path / "log").read_text()
    finally:
        cluster.shutdown()
    assert_same(tmp_path, undisturbed(epochs))
    log = (tmp_path / "log").read_text()
    sizes = [int(size) for size in re.findall(r"training on (\d) worker", log)]
    assert sizes == [2, 1, 2], log


@pytest.mark.chaos
def test_a_preemption_notice_triggers_a_checkpoint(tmp_path):
    """Like a spot machine that is reclaimed: a notice, a short delay, and the node is gone."""
    config = parse([*OPTIONS, "--optim.batch_size", "8"]).config
    num_samples = len(dataset.prepare_dataset(config, str(tmp_path)).open("train")[1])
    steps_per_epoch = batch_sampler.num_steps(num_samples, 8)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        options = (
            *("--workers.num", "[1,2]", "--optim.batch_size", "8", "--optim.epochs", "60"),
            *("--checkpoint.every_steps", "1000000", "--workers.micro_batches", "2"),
        )
        # Ray first requests two workers again, on a node that no longer accepts any.
        brief = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
        process = start(tmp_path, *options, address=cluster.address, **brief)
        wait_for(lambda: mid_epoch(tmp_path, steps_per_epoch), process)
        command = ["drain-node", "--address", cluster.address, "--node-id", nodes[1].node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
        command += ["--deadline-remaining-seconds", "20"]
        ray = str(Path(sys.executable).with_name("ray"))
        subprocess.run([ray, *command], check=True, capture_output=True, timeout=60)

        def urgent():
            step = mid_epoch(tmp_path, 1)
            return step % steps_per_epoch and step

        kept_at = wait_for(urgent, process)
        cluster.remove_node(nodes[1], allow_graceful=False)
        assert exit_code(process, tmp_path, 2 * DEADLINE_S) == 0, (tmp_path / "log").read_text()
    finally:
        cluster.shutdown()
    log = (tmp_path / "log").read_text()
    (resumed,) = re.findall(r"training on 1 worker, from step (\d+)", log)
    assert int(resumed) >= kept_at, log
