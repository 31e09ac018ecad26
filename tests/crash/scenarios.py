"""What is written while faults are injected, and how it is read afterwards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from cluster import commit
from serve.offline import output
from tests.crash.run import Report
from train.loop.checkpoint import CheckpointManager, TrainingState

VERSIONS = (1, 2, 3)


class Checkpoints:
    """Of which only the latest is kept."""

    def write(self, folder: Path, report: Report) -> None:
        store = CheckpointManager(str(folder / "checkpoints"), keep=1)
        for version in VERSIONS:
            tensors = {"weight": torch.full((300,), float(version))}
            store.save(TrainingState(tensors, {"step": version}), best_step=None)
            if error := store.settle():
                raise error
            report(version)

    def version(self, folder: Path) -> int:
        state = CheckpointManager(str(folder / "checkpoints"), keep=1).latest()
        if state is None:
            return 0
        step = int(state.values["step"])
        assert torch.equal(state.tensors["weight"], torch.full((300,), float(step)))
        return step


class DamagedCheckpoints(Checkpoints):
    """Where each step has a checkpoint already, with one byte changed."""

    def write(self, folder: Path, report: Report) -> None:
        for version in VERSIONS[1:]:
            damaged = folder / "checkpoints" / f"step-{version:08d}"
            commit.make_folder(damaged)
            (damaged / "state.safetensors").write_bytes(b"x")
            (damaged / "state.json").write_text("{}")
            (damaged / commit.DIGESTS).write_text('{"state.safetensors": "", "state.json": ""}')
        super().write(folder, report)


class SmallFile:
    """A file that is replaced, as states, records and histories are."""

    def write(self, folder: Path, report: Report) -> None:
        for version in VERSIONS:
            content = {"version": version, "more": "x" * 9000}
            commit.write_atomic(str(folder / "state.json"), json.dumps(content).encode(), 0o600)
            report(version)

    def version(self, folder: Path) -> int:
        path = folder / "state.json"
        return int(json.loads(path.read_text())["version"]) if path.exists() else 0


class Parquet:
    """A file that a library writes in another language."""

    def write(self, folder: Path, report: Report) -> None:
        for version in VERSIONS:
            table = pa.table({"version": np.full(5000, version)})
            output.write_parquet(table, str(folder / "out" / "part-000000.parquet"))
            report(version)

    def version(self, folder: Path) -> int:
        path = folder / "out" / "part-000000.parquet"
        if not path.exists():
            return 0
        (version,) = set(pa.parquet.read_table(path)["version"].to_pylist())
        return int(version)


class Folders:
    """Folders of several files, each committed once, as shards and bundles are."""

    def write(self, folder: Path, report: Report) -> None:
        for version in VERSIONS:
            with commit.atomic_folder(str(folder / "data" / str(version))) as aside:
                (aside / "train").mkdir()
                for number in range(2):
                    np.save(aside / "train" / f"input-{number}.npy", np.full(1000, version))
                source = aside / "source"
                source.write_text("x" * 100)
                shutil.copyfile(source, aside / "copy")
            report(version)

    def version(self, folder: Path) -> int:
        whole = [version for version in VERSIONS if (folder / "data" / str(version)).exists()]
        for version in whole:
            commit.check_folder(folder / "data" / str(version))
        return max(whole, default=0)


SCENARIOS = {
    "checkpoints": Checkpoints,
    "damaged": DamagedCheckpoints,
    "file": SmallFile,
    "parquet": Parquet,
    "folders": Folders,
}
