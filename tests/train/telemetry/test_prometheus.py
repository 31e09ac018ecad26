"""Prometheus gauges of a run: their values after events, and their export by Ray."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import ray
import torch
from prometheus_client.parser import text_string_to_metric_families
from ray._private.state import actors

from cluster import connect
from cluster.errors import CommandFailed
from tests.conftest import make_config
from tests.train.loop.test_recovery import largest_file
from train.data import batch_sampler
from train.distributed import launcher
from train.loop.checkpoint import CheckpointManager, TrainingState
from train.loop.run_directory import Run
from train.telemetry.prometheus import PREFIX, WORDS, TrainingGauges


class Fake:
    """A fake clock, and gauges that record their values."""

    def __init__(self):
        self.time = 1000.0
        self.values = {}
        self.set_all = threading.Event()

    def now(self):
        return self.time

    def make(self, name, words, run):
        outer = self

        class One:
            def set(self, value):
                outer.values[name.removeprefix(PREFIX), run] = value
                outer.set_all.set()

        return One()


def shown(*events):
    """Return the values of a run's gauges after events that are a minute apart."""
    fake = Fake()
    told = TrainingGauges("a", 300.0, make=fake.make, now=fake.now)
    for event in events:
        fake.time += 60
        told.show(event)
    with told:
        assert fake.set_all.wait(10)
    assert {run for _, run in fake.values} == {"a"}
    return {name: value for (name, _), value in fake.values.items()}


START = {"event": "start", "workers": 2, "step": 0, "total_steps": 90}
EPOCH = {"event": "epoch", "epoch": 1, "train_loss": 0.7, "valid_loss": 0.6, "samples_per_s": 80.0}


def steps(step):
    return {"event": "steps", "step": step, "loss": 0.9, "samples_per_s": 100.0, "rate": 0.1}


def test_gauges_show_the_state_of_a_run():
    assert shown() == {
        "progress_timestamp_seconds": 1000,
        "checkpoint_timestamp_seconds": 1000,
        "checkpoint_interval_seconds": 300,
    }
    values = shown(START, steps(10), EPOCH, {"event": "checkpoint", "step": 30}, steps(40))
    assert values == {
        "starts": 1,
        "step": 40,
        "total_steps": 90,
        "loss": 0.9,
        "valid_loss": 0.6,
        "samples_per_second": 100,
        "progress_timestamp_seconds": 1300,
        "checkpoint_timestamp_seconds": 1240,
        "checkpoint_interval_seconds": 300,
    }
    assert values.keys() == WORDS.keys()


def test_repeated_steps_do_not_count_as_progress():
    values = shown(START, steps(10), steps(20), {**START, "step": 5}, steps(10), steps(20))
    assert values["progress_timestamp_seconds"] == 1180
    assert values["starts"] == 2
    again = shown(START, steps(10), steps(20), {**START, "step": 5}, steps(20), steps(30))
    assert again["progress_timestamp_seconds"] == 1360


def test_other_events_change_no_gauge():
    unwritten = {"event": "unwritten", "error": "the disk is full", "last": 10}
    assert shown(START, unwritten, {"event": "halved", "micro_batch": 8}) == shown(START)


def test_a_checkpoint_is_announced_once_it_is_complete(tmp_path):
    told = []

    def written(step):
        told.append(
            (step, CheckpointManager(str(tmp_path / "run"), keep=2).load(step).values["step"])
        )

    store = CheckpointManager(str(tmp_path / "run"), keep=2, written=written)
    store.save(TrainingState({}, {"step": 3}), None)
    assert store.settle() is None
    assert wait_for(lambda: told, bool, 10) == [(3, 3)]


def test_a_checkpoint_that_was_not_written_is_not_announced(tmp_path):
    told = []
    store = CheckpointManager(str(tmp_path / "run"), keep=2, written=told.append)
    with largest_file(4096):
        store.save(TrainingState({"large": torch.zeros(4096)}, {"step": 3}), None)
        assert isinstance(store.settle(), OSError)
    # One thread announces both checkpoints in order.
    store.save(TrainingState({}, {"step": 4}), None)
    store.settle()
    assert wait_for(lambda: told, bool, 10) == [4]


@contextmanager
def measured_ray():
    """Run Ray with metrics in this process; yield a function that returns their text."""
    connect.connect(num_cpus=4)
    try:
        port = ray.nodes()[0]["MetricsExportPort"]
        yield lambda: httpx.get(f"http://127.0.0.1:{port}/metrics").text
    finally:
        connect.disconnect()


def exported(text, run):
    """Return a run's gauges in the text of a node: name without the prefix → value."""
    start = f"ray_{PREFIX}"
    return {
        sample.name.removeprefix(start): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(start) and sample.labels["run"] == run
    }


def wait_for(look, condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition(found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s; the last was {found}"
        time.sleep(0.2)
    return found


def kill_workers():
    """Kill the training workers of this process's Ray."""
    for actor in actors().values():
        if actor["ActorClassName"] == "RayTrainWorker" and actor["State"] == "ALIVE":
            os.kill(actor["Pid"], signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_exports_a_live_run_and_drops_a_killed_one(digits, tmp_path):
    config = make_config(
        optim={"epochs": 10_000, "batch_size": 64},
        workers={"num": 1, "max_failures": 0},
        checkpoint={"every_minutes": 2},
        storage={"path": str(tmp_path)},
    )
    run = Run.start(str(tmp_path / "digits-1"), config)
    failures = []

    def train():
        try:
            launcher.train(config, run, digits)
        except CommandFailed as error:
            failures.append(error)

    began = time.time()
    with measured_ray() as text:

        def look():
            return exported(text(), run.name)

        training = threading.Thread(target=train)
        training.start()
        try:
            first = wait_for(look, lambda found: found.keys() == WORDS.keys(), 120)
            moves = ("step", "progress_timestamp_seconds", "checkpoint_timestamp_seconds")
            later = wait_for(
                look, lambda found: all(found.get(name, 0) > first[name] for name in moves), 60
            )
        finally:
            kill_workers()
            training.join(120)
        assert len(failures) == 1
        wait_for(look, lambda found: not found, 60)
    assert first["total_steps"] == 10_000 * batch_sampler.num_steps(
        len(digits.open("train")[1]), 64
    )
    assert first["checkpoint_interval_seconds"] == 120
    assert first["starts"] == 1
    assert first["loss"] > 0
    assert first["samples_per_second"] > 0
    for name in ("progress_timestamp_seconds", "checkpoint_timestamp_seconds"):
        assert began < first[name] < later[name] <= time.time()
