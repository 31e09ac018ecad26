"""Data reported as written survives failed calls, kills and power cuts at any system call."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from cluster import commit, private
from cluster.errors import UserError
from tests.crash.scenarios import SCENARIOS
from tests.server import REPOSITORY

# Maximum number of calls per scenario at which faults are injected; a manual run takes all.
MOST_POINTS = 60
FAULTS = {"ENOSPC", "EIO", "killed", "power", "power, renames"}


@pytest.fixture(scope="module")
def interpose(tmp_path_factory):
    """Compile the library that intercepts system calls; return its path."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    library = tmp_path_factory.mktemp("interpose") / "interpose.so"
    source = REPOSITORY / "tests/crash/interpose.c"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_reported_data_survives_a_fault_at_any_call(name, interpose, bundle, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "tests.crash.run", name, str(tmp_path), str(MOST_POINTS)],
        cwd=REPOSITORY,
        env={**os.environ, "LD_PRELOAD": str(interpose), "BUNDLE": str(bundle.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["problems"] == [], result.stderr
    assert found["outcomes"].keys() == FAULTS
    for outcome in found["outcomes"].values():
        assert outcome["points"] == min(found["calls"], MOST_POINTS) > 10
        # Some faults come after the last report, so the latest version must have been found.
        assert outcome["latest"] > 0


def fill(folder: Path, content: str) -> None:
    with commit.atomic_folder(str(folder)) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "file").write_text(content)


def test_a_damaged_folder_is_replaced_and_a_whole_one_stays(tmp_path):
    target = tmp_path / "deep" / "target"
    fill(target, "first")
    fill(target, "second")
    assert (target / "sub/file").read_text() == "first"
    (target / "sub/file").write_text("damage")
    with pytest.raises(commit.DamagedFile, match="sub/file' differs from its digest"):
        commit.check_folder(target)
    fill(target, "second")
    commit.check_folder(target)
    assert (target / "sub/file").read_text() == "second"
    for damage in (lambda: (target / "sub/file").unlink(), (target / commit.DIGESTS).unlink):
        damage()
        assert not commit.is_whole(target)
        fill(target, "third")
        assert (target / "sub/file").read_text() == "third"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_folder_is_not_written_if_its_check_raises(tmp_path):
    def refuse():
        raise UserError("others continue the run")

    with (
        pytest.raises(UserError, match="others"),
        commit.atomic_folder(str(tmp_path / "target"), check=refuse) as aside,
    ):
        (aside / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    commit.write_atomic(str(path), b"first", 0o600)
    with suppress(ZeroDivisionError), commit.atomic_file(str(path)) as stream:
        stream.write(b"second")
        raise ZeroDivisionError
    assert path.read_bytes() == b"first"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_changed_url_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(private, "PARENT", tmp_path)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/changing/last", b"1")
    memory.pipe_file("/changing/data", b"before")
    first = commit.fetch("memory://changing", "last")
    assert commit.fetch("memory://changing", "last") == first
    memory.pipe_file("/changing/data", b"longer than before")
    again = commit.fetch("memory://changing", "last")
    assert (again / "data").read_bytes() == b"longer than before"
    assert (first / "data").read_bytes() == b"before"


class Shortened(fsspec.get_filesystem_class("memory")):
    """A store that keeps fewer bytes than it receives and reports success."""

    protocol = "shortened"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def size(self, path):
        return super().size(path) - 1


def test_a_store_that_truncates_files_is_an_error(tmp_path):
    fsspec.register_implementation("shortened", Shortened, clobber=True)
    with pytest.raises(OSError, match=r"bytes; \d+ were written"):
        commit.write_atomic("shortened://bucket/file", b"content")
    with pytest.raises(OSError, match=r"bytes; \d+ were written"):
        fill_url("shortened://bucket/folder")


def fill_url(url: str) -> None:
    with commit.atomic_folder(url) as aside:
        (aside / "file").write_text("content")
