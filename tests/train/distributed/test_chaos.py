"""Training with a cut network and on a full disk. Prints measurements, which -s shows."""

import json
import os
import re
import subprocess
import threading
from contextlib import contextmanager

import pytest

from cluster.local import lifecycle
from tests.conftest import run_main
from tests.load import wait_for
from tests.serve.test_chaos import QUICK, processes
from tests.train.distributed.test_faults import (
    DEADLINE_S,
    assert_same,
    mid_epoch,
    run_name,
    start,
    undisturbed,
)
from train.bundle import Bundle, registry

__all__ = ["undisturbed"]  # a fixture

pytestmark = [
    pytest.mark.ray,
    pytest.mark.chaos,
    pytest.mark.skipif(os.getuid() != 0, reason="needs permission for namespaces and mounts"),
]

WORKER = "RayTrainWorker"


class Writes:
    """Watches a run's folder and records the checkpoints, and those written twice."""

    def __init__(self, root):
        self.inodes, self.twice = {}, []
        self._root, self._end = root, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def _watch(self):
        while not self._end.wait(0.01):
            for folder in self._root.glob("train/*/checkpoints/step-*"):
                try:
                    inode = folder.stat().st_ino
                except FileNotFoundError:  # deleted since, as only the last ones are kept
                    continue
                if self.inodes.setdefault(folder.name, inode) != inode:
                    self.twice.append(folder.name)


def test_a_cut_off_worker_stops_writing_after_a_takeover(undisturbed, tmp_path):
    epochs = 300
    with (
        lifecycle.running(3, 1, head_cpus=0, environment=QUICK) as cluster,
        Writes(tmp_path) as writes,
    ):
        options = (
            "--workers.num",
            "1",
            "--workers.micro_batches",
            "2",
            "--optim.epochs",
            str(epochs),
        )
        process = start(tmp_path, *options, address=cluster.address)
        wait_for(lambda: mid_epoch(tmp_path, 100))
        (lost,) = [name for name in cluster.names if processes(cluster, WORKER, name)]
        cluster.cut(lost)
        cut_at = mid_epoch(tmp_path, 0)
        log = tmp_path / "log"
        over_s = wait_for(lambda: log.read_text().count("training on 1 worker") == 2)
        # The cut-off worker waits, as it cannot report its steps. After healing it is superseded.
        assert processes(cluster, WORKER, lost)
        cluster.heal(lost)
        wait_for(lambda: not processes(cluster, WORKER, lost))
        assert process.wait(3 * DEADLINE_S) == 0, log.read_text()
    (resumed,) = re.findall(r"training on 1 worker, from step (\d+)", log.read_text())
    figures = {"cut_at_step": cut_at, "resumed_at_step": int(resumed), "taken_over_s": over_s}
    print(f"\npartition: {json.dumps(figures)}")
    assert int(resumed) >= cut_at
    assert writes.twice == []
    assert_same(tmp_path, undisturbed(epochs))


@contextmanager
def small_disk(place, megabytes):
    """Mount a file system of this size at a folder during the block."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(place)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place, leave_bytes=0):
    """Fill a disk except for `leave_bytes`; return the file, whose removal frees the space."""
    ballast = place / "ballast"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    with ballast.open("wb") as file:
        file.write(bytes(max(0, free - leave_bytes)))
    return ballast


def test_training_continues_on_a_full_disk_and_loses_nothing(undisturbed, tmp_path):
    place = tmp_path / "disk"
    epochs = 100
    with small_disk(place, 64):
        process = start(place, "--optim.epochs", str(epochs), log=tmp_path / "log")
        wait_for(lambda: mid_epoch(place, 50))
        ballast = fill(place)
        wait_for(lambda: "could not be written" in (tmp_path / "log").read_text())
        kept = mid_epoch(place, 50)
        ballast.unlink()
        assert process.wait(2 * DEADLINE_S) == 0, (tmp_path / "log").read_text()
        print(f"\nfull disk: last checkpoint that stayed is of step {kept}")
        assert_same(place, undisturbed(epochs))


@pytest.mark.parametrize("leave_bytes", [0, 200_000, 600_000, 1_500_000])
def test_a_full_disk_at_registration_leaves_production_unchanged(tmp_path, leave_bytes):
    place = tmp_path / "disk"
    options = ["--storage.path", str(place), "--optim.epochs", "2", "--net.widths", "[16,32]"]
    with small_disk(place, 64):
        done = run_main(options)
        assert done.returncode == 0, done.stderr
        first = json.loads(done.stdout.splitlines()[-1])
        again = ["--resume", run_name(place), *options]
        ballast = fill(place, leave_bytes)
        second = run_main(again)
        location, version = registry.resolve_model("models:/digits@production", str(place))
        Bundle.load(location)
        said = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
        print(f"\n{leave_bytes} bytes left at registration: exit {second.returncode}, {said}")
        if second.returncode == 0:
            assert leave_bytes > 0
            assert version == str(first["version"] + 1)
            return
        assert second.returncode == 1
        assert len(said) == 1
        assert "Traceback" not in second.stderr
        assert version == str(first["version"])
        ballast.unlink()
        done = run_main(again)
        assert done.returncode == 0, done.stderr
        _, version = registry.resolve_model("models:/digits@production", str(place))
        assert int(version) > first["version"]
