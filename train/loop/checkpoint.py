"""Checkpoints: the complete state of a run, written atomically and verified by digest.

A checkpoint is the directory `step-00001234` with `state.safetensors`, `state.json` and
`digests.json`, which is written last. It contains no pickles. A checkpoint is reported as written
once it is on disk and was read back; only then are older checkpoints deleted.
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
    """A checkpoint does not match its digests. The message names the file."""


class Superseded(Exception):
    """Other processes continue the run, so this process must not write checkpoints."""


class CheckpointManager:
    """The checkpoints of one run, in a directory or at a URL. Only rank 0 writes.

    A worker that is cut off from the network and has been replaced may still be running and able to
    write files. A worker therefore claims the run before it writes, and stops writing when another
    worker or command has claimed the run.

    written: called with the step of each complete checkpoint, usually in the writing thread.
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
        """Start or continue the run; return the owner id with which its workers may claim it."""
        owner = secrets.token_hex(8)
        self._put_writer([owner, ""])
        return owner

    def claim(self, owner: str) -> None:
        """Become the run's writer. Raises Superseded if the run now belongs to another owner."""
        if self._writer()[0] != owner:
            raise Superseded("another command has taken over the run")
        self._claimed = [owner, secrets.token_hex(8)]
        self._put_writer(self._claimed)

    def save(self, state: TrainingState, best_step: int | None) -> None:
        """Write a state in the background; the caller must not change its tensors afterwards.

        Call `settle` first, which returns the result of the previous write.
        """
        assert self._pending is None
        writing = self._thread.submit(self._write, state, best_step)
        self._pending = state, best_step, writing
        # Not in _write: a failure of the callback is not a failure to write.
        writing.add_done_callback(
            lambda done: None if done.exception() else self._written(state.values["step"])
        )

    def settle(self) -> OSError | None:
        """Wait for the write that `save` started; return its OSError, or None if it succeeded.

        Older checkpoints stay if the write failed. Other errors, such as Superseded, are raised.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        error = pending[2].exception()
        if error is not None and not isinstance(error, OSError):
            raise error
        return error

    def finish(self) -> None:
        """Wait for the last write and repeat it once if it failed.

        Raises OSError if the second attempt fails, too.
        """
        if self._pending is not None:
            state, best_step, _ = self._pending
            if self.settle() is not None:
                self._write(state, best_step)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending. A checkpoint may be damaged."""
        names = storage.list_names(self._url)
        found = (name.removeprefix("step-") for name in names if name.startswith("step-"))
        return sorted(int(name) for name in found if name.isdecimal())

    def latest(self) -> TrainingState | None:
        """Return the last undamaged checkpoint, or None; report damaged ones on stderr.

        Raises OSError if a checkpoint cannot be fetched, because it may be undamaged.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except DamagedCheckpoint as error:
                print(f"{error}; using the checkpoint before it", file=sys.stderr)
        return None

    def load(self, step: int) -> TrainingState:
        """Return the checkpoint of a step. Raises DamagedCheckpoint, which names the file."""
        folder = self._fetch(step)
        tensors = safetensors.torch.load_file(folder / TENSORS)
        return TrainingState(tensors, json.loads((folder / VALUES).read_text()))

    def adopt(self, donor: "CheckpointManager", step: int) -> None:
        """Copy a checkpoint of another run to continue from, and that of its best epoch so far.

        Raises DamagedCheckpoint, which names the file.
        """
        best = donor.load(step).values["best_step"]
        for each in dict.fromkeys((best, step) if best in donor.steps() else (step,)):
            source = donor._fetch(each)
            with commit.atomic_folder(self._step_url(each)) as folder:
                for name in (TENSORS, VALUES):
                    shutil.copyfile(source / name, folder / name)

    def _fetch(self, step: int) -> Path:
        """Return a local folder with the verified checkpoint of a step.

        Raises DamagedCheckpoint, which names the file.
        """
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
                # Raises SafetensorError if the file is shorter than its header says.
                with safetensors.safe_open(folder / TENSORS, "pt"):
                    pass
            except safetensors.SafetensorError as error:  # for example, the disk is full
                raise OSError(str(error)) from error
            (folder / VALUES).write_text(json.dumps(state.values))
        self._check_claim()
        self._delete_old(step, best_step)

    def _delete_old(self, written: int, best_step: int | None) -> None:
        """Delete old checkpoints, except the latest `keep` ones and that of the best epoch.

        Checkpoints after the one just written do not count. They are damaged, because otherwise the
        run would have continued from them.
        """
        for step in [each for each in self.steps() if each <= written][: -self._keep]:
            if step != best_step:
                storage.remove(self._step_url(step))

    def _check_claim(self) -> None:
        if self._claimed is not None and self._writer() != self._claimed:
            raise Superseded("the run is continued by other workers; this worker stops")

    def _writer(self) -> list[str]:
        fs, path = storage.filesystem(storage.join_path(self._url, WRITER))
        writer: list[str] = json.loads(fs.cat_file(path))
        return writer

    def _put_writer(self, writer: list[str]) -> None:
        commit.write_atomic(storage.join_path(self._url, WRITER), json.dumps(writer).encode())

    def _step_url(self, step: int) -> str:
        return storage.join_path(self._url, f"step-{step:08d}")


def load_best_weights(store: CheckpointManager) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Return the weights of a finished run's best epoch by name, and the metrics of every epoch.

    The weights have the shapes of the network's state dict.
    """
    last = store.latest()
    assert last is not None, "a finished run has a checkpoint"
    best = last.values["best_step"]
    found = last
    if best in store.steps():
        found = store.load(best)
    else:
        print(
            f"the checkpoint of the best epoch, at step {best}, could not be written; "
            f"the model is that of the last checkpoint, at step {last.values['step']}",
            file=sys.stderr,
        )
    return states.exported_weights(found.tensors), last.values["history"]
