"""Checkpoints: the complete state of a run, whole or absent, verified by digest.

A checkpoint is the directory `step-00001234` with `state.safetensors`, `state.json`, and
`digests.json`, which is written last. Nothing in it is a pickle. A checkpoint that is reported as
written is on disk and was read back; those before it are deleted only then.
"""

import json
import secrets
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from cluster import commit, storage
from train.loop import state_dict as states

TENSORS = "state.safetensors"
VALUES = "state.json"
WRITER = "writer.json"


@dataclass(frozen=True)
class TrainingState:
    """Tensors and plain values by name; `values["step"]` is the number of steps taken."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class DamagedCheckpoint(Exception):
    """A checkpoint that differs from its digests. The message names the file."""


class Superseded(Exception):
    """Others continue the run. What this process would write is theirs to write."""


class CheckpointManager:
    """The checkpoints of one run, in a directory or at a URL. Only rank 0 writes.

    A worker that the network is cut off from, and that others have been started for, may still be
    at work and reach the files. So the one that writes has claimed to, and stops when another has.

    written: told the step of each checkpoint that is whole, in the thread that wrote it.
    """

    def __init__(
        self, url: str, keep: int, written: Callable[[int], None] = lambda step: None
    ) -> None:
        self._url = url
        self._keep = keep
        self._written = written
        self._claimed: list[str] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[TrainingState, int | None, Future[None]] | None = None

    def hand_over(self) -> str:
        """Begin or continue the run; return the name under which its workers may claim it."""
        owner = secrets.token_hex(8)
        self._put_writer([owner, ""])
        return owner

    def claim(self, owner: str) -> None:
        """Be the one that writes. Raises Superseded if the run was handed over to another."""
        if self._writer()[0] != owner:
            raise Superseded("another command has taken over the run")
        self._claimed = [owner, secrets.token_hex(8)]
        self._put_writer(self._claimed)

    def save(self, state: TrainingState, best_step: int | None) -> None:
        """Write a state in the background; the caller must not change its tensors afterwards.

        Only after `settle`, which tells what became of the one before.
        """
        assert self._pending is None
        writing = self._thread.submit(self._write, state, best_step)
        self._pending = state, best_step, writing
        # Not in _write: who is told may fail, and the checkpoint is there all the same.
        writing.add_done_callback(
            lambda done: None if done.exception() else self._written(state.values["step"])
        )

    def settle(self) -> OSError | None:
        """Wait until what was saved is on disk; return why it is not. What was there stays."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        error = pending[2].exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        return error

    def finish(self) -> None:
        """Have the last state on disk: try once more if need be. Raises OSError."""
        if self._pending is not None:
            state, best_step, _ = self._pending
            if self.settle() is not None:
                self._write(state, best_step)

    def steps(self) -> list[int]:
        """Steps at which there is a checkpoint, ascending. It may yet be damaged."""
        names = storage.list_names(self._url)
        found = (name.removeprefix("step-") for name in names if name.startswith("step-"))
        return sorted(int(name) for name in found if name.isdecimal())

    def latest(self) -> TrainingState | None:
        """The last checkpoint that is whole; says on stderr which ones it passes over.

        Raises OSError where one cannot be fetched, as it may be whole.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except DamagedCheckpoint as error:
                print(f"{error}; using the checkpoint before it", file=sys.stderr)
        return None

    def load(self, step: int) -> TrainingState:
        """Raises DamagedCheckpoint, naming the file."""
        folder = self._fetch(step)
        tensors = safetensors.torch.load_file(folder / TENSORS)
        return TrainingState(tensors, json.loads((folder / VALUES).read_text()))

    def adopt(self, donor: "CheckpointManager", step: int) -> None:
        """Copy a checkpoint of another run, and that of its best epoch so far, to continue from.

        Raises DamagedCheckpoint, naming the file.
        """
        best = donor.load(step).values["best_step"]
        for each in dict.fromkeys((best, step) if best in donor.steps() else (step,)):
            source = donor._fetch(each)
            with commit.atomic_folder(self._step_url(each)) as folder:
                for name in (TENSORS, VALUES):
                    shutil.copyfile(source / name, folder / name)

    def _fetch(self, step: int) -> Path:
        """Return a local folder with a checkpoint. Raises DamagedCheckpoint, naming the file."""
        try:
            folder = commit.fetch(self._step_url(step), last=commit.DIGESTS)
            for name in (TENSORS, VALUES):
                commit.check_file(folder, name)
        except (commit.DamagedFile, commit.IncompleteFolder) as error:
            raise DamagedCheckpoint(str(error)) from error
        return folder

    def _write(self, state: TrainingState, best_step: int | None) -> None:
        step = state.values["step"]
        target, check = self._step_url(step), self._check_claim
        with commit.atomic_folder(target, check=check) as folder:
            try:
                safetensors.torch.save_file(state.tensors, folder / TENSORS)
                # Raises where the file is shorter than its header says.
                with safetensors.safe_open(folder / TENSORS, "pt"):
                    pass
            except safetensors.SafetensorError as error:  # a full disk, among others
                raise OSError(str(error)) from error
            (folder / VALUES).write_text(json.dumps(state.values))
        self._check_claim()
        self._delete_old(step, best_step)

    def _delete_old(self, written: int, best_step: int | None) -> None:
        """Delete those before the one just written, but the latest and that of the best epoch.

        Those after it are damaged: else the run would have continued from them.
        """
        for step in [each for each in self.steps() if each <= written][: -self._keep]:
            if step != best_step:
                storage.remove(self._step_url(step))

    def _check_claim(self) -> None:
        if self._claimed is not None and self._writer() != self._claimed:
            raise Superseded("the run is continued by others; this worker stops")

    def _writer(self) -> list[str]:
        fs, path = storage.filesystem(storage.join_path(self._url, WRITER))
        writer: list[str] = json.loads(fs.cat_file(path))
        return writer

    def _put_writer(self, writer: list[str]) -> None:
        commit.write_atomic(storage.join_path(self._url, WRITER), json.dumps(writer).encode())

    def _step_url(self, step: int) -> str:
        return storage.join_path(self._url, f"step-{step:08d}")


def load_best_weights(store: CheckpointManager) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Return the weights of a finished run's best epoch, and its figures by epoch."""
    last = store.latest()
    assert last is not None, "a finished run has a checkpoint"
    best = last.values["best_step"]
    found = last
    if best in store.steps():
        found = store.load(best)
    else:
        print(
            f"the checkpoint of the best epoch, at step {best}, could not be written; "
            f"the model is that of step {last.values['step']}",
            file=sys.stderr,
        )
    return states.exported_weights(found.tensors), last.values["history"]
