"""Scenarios for fault injection: each writes versions of some data and reads them afterwards."""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from cluster import commit
from serve.control.desired_state import DesiredStateStore
from serve.offline import output
from serve.requestlog.files import REQUESTS, LogWriter, log_folder, read_log_tables
from serve.state import ServingState
from tests.crash.run import Report
from train.bundle import Bundle
from train.config import Config, validate_config
from train.data import data_report, dataset
from train.loop.checkpoint import CheckpointManager, TrainingState

VERSIONS = (1, 2, 3)


class Checkpoints:
    """Checkpoints of which only the latest is kept."""

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
    """Checkpoints in a store in which the later steps already have a damaged checkpoint."""

    def write(self, folder: Path, report: Report) -> None:
        for version in VERSIONS[1:]:
            damaged = folder / "checkpoints" / f"step-{version:08d}"
            commit.make_folder(damaged)
            (damaged / "state.safetensors").write_bytes(b"x")
            (damaged / "state.json").write_text("{}")
            (damaged / commit.DIGESTS).write_text('{"state.safetensors": "", "state.json": ""}')
        super().write(folder, report)


class SmallFile:
    """A file that is replaced, like states, records, histories and the files of studies."""

    def write(self, folder: Path, report: Report) -> None:
        for version in VERSIONS:
            content = {"version": version, "more": "x" * 9000}
            commit.write_atomic(str(folder / "state.json"), json.dumps(content).encode(), 0o600)
            report(version)

    def version(self, folder: Path) -> int:
        path = folder / "state.json"
        return int(json.loads(path.read_text())["version"]) if path.exists() else 0


class Parquet:
    """A file that is written by a library in another language (Arrow, in C++)."""

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
    """Folders of several files, each committed once, like shards and bundles."""

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


class Shards:
    """The encoded records of a table, which a run writes before it trains."""

    def __init__(self) -> None:
        import sklearn.tree  # noqa: F401 - otherwise each child would import it

        # Drawing takes a second, and there are hundreds of child processes.
        data_report.plot_report = lambda facts, column, path: path.write_bytes(b"picture")
        self._sources = tempfile.TemporaryDirectory()
        for version in VERSIONS:
            rows = "".join(f"{number},{number % 2}\n" for number in range(version, version + 60))
            Path(self._sources.name, f"{version}.csv").write_text(f"x,y\n{rows}")

    def _config(self, version: int) -> Config:
        options = {"name": "x", "target": "y", "task_type": "classification"}
        source = str(Path(self._sources.name, f"{version}.csv"))
        return validate_config({**options, "features": {"x": "number"}, "data": {"train": source}})

    def write(self, folder: Path, report: Report) -> None:
        for version in VERSIONS:
            dataset.prepare_dataset(self._config(version), str(folder))
            report(version)

    def version(self, folder: Path) -> int:
        found = 0
        for path in (folder / "data").glob("*/summary.json"):
            commit.check_folder(path.parent)
            data = dataset.EncodedDataset(str(path.parent), json.loads(path.read_text()))
            inputs, targets_N = data.open("train")
            assert len(inputs["numbers"]) == len(targets_N) > 30
            source = Path(data.summary["splits"]["train"]["source"])
            found = max(found, int(source.stem))
        return found


class ServingStates:
    """The stored state that a model's replicas should serve."""

    STATE = ServingState(0, "digits", "1", {"1": "/one"}, incarnation="deployment")

    def write(self, folder: Path, report: Report) -> None:
        store = DesiredStateStore(str(folder), self.STATE)
        desired = store.read()
        for version in VERSIONS:
            state = replace(self.STATE, revision=version)
            desired = store.write(replace(desired, state=state))
            report(version)

    def version(self, folder: Path) -> int:
        return DesiredStateStore(str(folder), self.STATE).read().state.revision


class RequestLog:
    """Files of a request log, which are rewritten when rows are added."""

    def write(self, folder: Path, report: Report) -> None:
        log = LogWriter(str(folder), REQUESTS, "digits", file_rows=100)
        for version in VERSIONS:
            log.append(pa.table({"version": [version]}), now_s=1e9 + version)
            report(version)

    def version(self, folder: Path) -> int:
        tables = read_log_tables(log_folder(str(folder), REQUESTS, "digits"))
        return max((max(table["version"].to_pylist()) for table in tables), default=0)


class Bundles:
    """Copies of the bundle at the path in the environment variable BUNDLE."""

    def __init__(self) -> None:
        self._given = Bundle.load(os.environ["BUNDLE"])
        files = self._given.manifest.files
        self._names = [name for name in files if not name.startswith("report/")]

    def write(self, folder: Path, report: Report) -> None:
        for version in VERSIONS:
            with Bundle.create(str(folder / "bundles" / str(version))) as writer:
                for name in self._names:
                    shutil.copyfile(self._given.path / name, writer.file(name))
                files = writer.files()
                writer.commit(self._given.manifest.model_copy(update={"files": files}))
            report(version)

    def version(self, folder: Path) -> int:
        found = [version for version in VERSIONS if (folder / "bundles" / str(version)).exists()]
        for version in found:
            assert Bundle.load(str(folder / "bundles" / str(version))).quantities
        return max(found, default=0)


SCENARIOS = {
    "checkpoints": Checkpoints,
    "damaged": DamagedCheckpoints,
    "file": SmallFile,
    "parquet": Parquet,
    "folders": Folders,
    "shards": Shards,
    "serving states": ServingStates,
    "request log": RequestLog,
    "bundles": Bundles,
}
