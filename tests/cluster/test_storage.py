"""Storage distinguishes existing files, missing files and a store that cannot be reached."""

import errno

import fsspec
import pytest

from cluster import storage
from cluster.nodes import node_checks
from serve.offline import output
from serve.retrain.history import RetrainHistory
from serve.rollout.monitor_state import MonitorState
from tests.conftest import make_config
from train.data import dataset
from train.data.reading import sources
from train.loop.checkpoint import CheckpointManager
from train.loop.run_directory import Run
from tune.run.study_store import Study


class Unreachable(fsspec.get_filesystem_class("memory")):
    """An object store that cannot be reached."""

    protocol = "unreachable"
    cachable = False
    error: type[OSError] = PermissionError

    def _fail(self, *_args, **_options):
        raise self.error(errno.EACCES, "the store does not answer")

    info = ls = find = cat_file = open = _open = _fail


@pytest.fixture(params=[PermissionError, ConnectionError, TimeoutError, OSError])
def unreachable(request, monkeypatch):
    monkeypatch.setattr(Unreachable, "error", request.param)
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    return "unreachable://bucket/runs"


@pytest.mark.parametrize(
    "ask",
    [
        lambda root: storage.exists(root),
        lambda root: storage.list_names(root),
        lambda root: storage.read_file(root),
        lambda root: storage.remove(root),
        lambda root: CheckpointManager(root, keep=1).steps(),
        lambda root: CheckpointManager(root, keep=1).latest(),
        lambda root: Run.resume(root, make_config()),
        lambda root: Study.load(root),
        lambda root: RetrainHistory(root, "digits").cooling(24),
        lambda root: MonitorState.read(root, "digits"),
        lambda root: output.part_exists(root, 0),
        lambda root: output.count_rows(root, 1),
        lambda root: dataset.prepare_dataset(make_config(), root),
    ],
)
def test_an_unreachable_store_is_not_treated_as_empty(unreachable, ask):
    """Code that takes an error for absence starts afresh, and deletes or repeats existing work."""
    with pytest.raises(OSError, match="does not answer"):
        ask(unreachable)


def test_a_checkpoint_that_cannot_be_fetched_is_not_skipped(monkeypatch):
    """If it were skipped, training would resume from an earlier one and delete this one."""
    root = "memory://checkpoints-that-fail"
    fs, path = storage.filesystem(root)
    for step in (1, 2):
        fs.pipe_file(f"{path}/step-{step:08d}/digests.json", b"{}")

    def fail(*_args, **_options):
        raise ConnectionError(errno.ECONNRESET, "connection reset")

    monkeypatch.setattr(type(fs), "find", fail)
    with pytest.raises(ConnectionError):
        CheckpointManager(root, keep=1).latest()


def test_an_unreadable_source_is_not_reported_as_missing(unreachable):
    with pytest.raises(Exception, match="does not answer") as caught:
        sources.find_source(f"{unreachable}/records.csv")
    assert "does not exist" not in str(caught.value)


def test_existing_files_and_folders_are_found(tmp_path):
    assert not storage.exists(f"{tmp_path}/file")
    assert storage.read_file(f"{tmp_path}/file") is None
    assert storage.list_names(f"{tmp_path}/folder") == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_text("x")
    (tmp_path / "folder" / "a").mkdir()
    assert storage.exists(f"{tmp_path}/folder")
    assert storage.list_names(f"{tmp_path}/folder") == ["a", "b"]
    assert storage.read_file(f"{tmp_path}/folder/b") == b"x"
    storage.remove(f"{tmp_path}/folder")
    storage.remove(f"{tmp_path}/folder")
    assert list(tmp_path.iterdir()) == []


def test_a_node_says_why_it_cannot_use_the_storage(tmp_path, unreachable):
    (tmp_path / "nonce").touch()
    assert node_checks.storage_problem(str(tmp_path), "nonce") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["nonce"]
    unseen = "cannot see files written by other machines"
    assert node_checks.storage_problem(str(tmp_path), "other") == unseen
    assert node_checks.storage_problem("memory://shared", "other") == unseen
    # Its files can be read, and nobody can create one, not even root.
    assert "No such file" in node_checks.storage_problem("/proc", "version")
    assert "does not answer" in node_checks.storage_problem(unreachable, "nonce")
