"""Runs on a full disk and with too little memory, profiles, and resumed runs."""

import contextlib
import errno
import gzip
import json
import resource
from dataclasses import dataclass, field

import pytest
import torch

from cluster.errors import UserError
from tests.conftest import make_config
from tests.train.loop.test_exact import Plain
from tests.train.loop.test_loop import ALONE
from train.data import batch_sampler
from train.data.dataset import EncodedDataset
from train.distributed import launcher
from train.distributed.worker import run_loop
from train.loop.checkpoint import CheckpointManager, TrainingState, load_best_weights
from train.loop.loop import Loop
from train.loop.run_directory import Run, WorkerSpec


@dataclass
class Told:
    """Collects the events of a run."""

    events: list[dict] = field(default_factory=list)

    def send(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]


@contextlib.contextmanager
def largest_file(num_bytes):
    """Limit the size of files during the block; larger writes fail like those on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_continues_past_an_unwritable_checkpoint(config, digits, tmp_path):
    store, told = CheckpointManager(str(tmp_path), keep=2), Told()
    full = largest_file(4096)

    def after_step():
        if loop.progress.step == 8:
            store.settle()
            full.__enter__()
        if loop.progress.step == 14:
            assert store.steps() == [5]
            assert store.load(5).values["step"] == 5  # complete
            full.__exit__(None, None, None)

    every_five = make_config(checkpoint={"every_steps": 5}, storage={"path": config.storage.path})
    loop = Loop(
        every_five,
        digits,
        ALONE,
        store,
        num_micro_batches=1,
        observe=told.send,
        after_step=after_step,
    )
    loop.run()
    (event,) = told.of("unwritten")
    assert event["last"] == 5
    assert "large" in event["error"].lower() or str(errno.EFBIG) in event["error"]
    assert not list(tmp_path.glob("part-*"))
    weights, history = load_best_weights(store)
    assert len(history) == 2

    undisturbed = CheckpointManager(str(tmp_path / "undisturbed"), keep=2)
    Loop(every_five, digits, ALONE, undisturbed, num_micro_batches=1).run()
    for name, value in load_best_weights(undisturbed)[0].items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0)


def test_a_run_whose_last_checkpoint_cannot_be_written_fails(config, digits, tmp_path):
    loop = Loop(
        config, digits, ALONE, CheckpointManager(str(tmp_path), keep=2), num_micro_batches=1
    )
    with largest_file(4096), pytest.raises(OSError, match=r"(?i)large"):
        loop.run()


class Hungry(Plain):
    """Runs out of memory with more than 20 images at once."""

    def forward(self, images_BHWC):
        if self.training and len(images_BHWC) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(images_BHWC)


def job_of(config: object, digits: EncodedDataset, folder: object) -> tuple[WorkerSpec, Told]:
    told = Told()
    run = Run.start(str(folder), config)
    owner = run.store(config.checkpoint.keep).hand_over()
    return WorkerSpec(run.config, run.url, digits.url, digits.summary, told, owner), told


def test_out_of_memory_halves_the_micro_batch_not_the_batch(config, digits, tmp_path):
    one = make_config(workers={"num": 1}, storage={"path": config.storage.path})
    job, told = job_of(one, digits, tmp_path / "hungry")
    smallest = batch_sampler.smallest_batch(len(digits.open("train")[1]), one.optim.batch_size)
    for _ in range(2):  # with micro-batches of about 64, then of half
        with pytest.raises(torch.OutOfMemoryError):
            run_loop(job, Run.open(job.run_url), ALONE, build=lambda config, task: Hungry())
    run = Run.open(job.run_url)
    assert run.num_micro_batches == 4
    run_loop(job, run, ALONE, build=lambda config, task: Hungry())
    assert [event["micro_batch"] for event in told.of("halved")] == [
        -(-smallest // 2),
        -(-smallest // 4),
    ]

    # The batches are equal, so the weights differ only by the order of summation.
    plain, _ = job_of(one, digits, tmp_path / "plain")
    run_loop(plain, Run.open(plain.run_url), ALONE, build=lambda config, task: Plain())
    expected = load_best_weights(Run.open(plain.run_url).store(2))[0]
    for name, value in load_best_weights(run.store(2))[0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


class Insatiable(Plain):
    def forward(self, images_BHWC):
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(images_BHWC)


def test_a_run_fails_if_two_samples_do_not_fit_in_memory(config, digits, tmp_path):
    one = make_config(
        optim={"batch_size": 5, "epochs": 1},
        workers={"num": 1},
        storage={"path": config.storage.path},
    )
    job, _ = job_of(one, digits, tmp_path / "run")
    tries = 0
    while not Run.open(job.run_url).failed():
        tries += 1
        with pytest.raises(torch.OutOfMemoryError):
            run_loop(job, Run.open(job.run_url), ALONE, build=lambda config, task: Insatiable())
    assert tries == 2
    assert "does not hold the net and 2 samples" in (Run.open(job.run_url).failure() or "")


def test_a_profile_is_a_trace_that_names_the_convolutions(config, digits, tmp_path):
    profiled = make_config(profile=True, workers={"num": 1}, storage={"path": config.storage.path})
    job, _ = job_of(profiled, digits, tmp_path / "run")
    run_loop(job, Run.open(job.run_url), ALONE)
    with gzip.open(tmp_path / "run/trace/trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::convolution" in names
    assert any(name and name.startswith("ProfilerStep") for name in names)
    assert "aten::" in (tmp_path / "run/trace/operators.txt").read_text()


def test_a_refused_command_does_not_take_over_the_run(config, digits, tmp_path, monkeypatch):
    run = Run.start(str(tmp_path / "run"), config)
    store = run.store(keep=1)
    store.claim(store.hand_over())

    def refuse(workers):
        raise UserError("workers.num is 64")

    monkeypatch.setattr(launcher, "check_resources", refuse)
    with pytest.raises(UserError, match="64"):
        launcher.train(config, run, digits)
    store.save(TrainingState({}, {"step": 1}), None)
    store.finish()
    assert store.steps() == [1]


@pytest.mark.parametrize(
    "changes", [{"metric": "last"}, {"metric": "valid_log_loss"}, {"metric": "valid_accuracy"}]
)
def test_a_resumed_run_cannot_change_its_checkpoint_metric(tmp_path, changes):
    """The best epoch so far was chosen, and its checkpoint kept, by the original metric."""
    Run.start(str(tmp_path / "run"), make_config(checkpoint={"keep": 1}))
    with pytest.raises(UserError, match=r"keeps its config, but checkpoint\.metric was None, is"):
        Run.resume(str(tmp_path / "run"), make_config(checkpoint={"keep": 1, **changes}))
    often = {"keep": 5, "every_steps": 3, "every_minutes": 1}
    Run.resume(str(tmp_path / "run"), make_config(checkpoint=often))
