"""Files that other users of the machine must not be able to read, write or create."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from cluster import auth, commit, connect, private, ray_address, ray_internals
from cluster.errors import CommandFailed, UserError
from tests.server import REPOSITORY

HEX = set("0123456789abcdef")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without a token."""
    for name in (auth.MODE, auth.TOKEN, auth.PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_token_is_created_once_and_is_private_to_its_user(home):
    auth.ensure_token()
    path = home / ".ray" / "auth_token"
    token = path.read_text()
    assert len(token) == 64
    assert set(token) <= HEX
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]
    auth.ensure_token()
    assert path.read_text() == token == auth.token()


def test_processes_that_create_the_token_at_once_agree(home):
    code = "from cluster import auth; auth.ensure_token(); print(auth.token())"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    tokens = {process.communicate()[0] for process in started}
    assert len(tokens) == 1


def test_a_readable_token_is_made_private_with_a_note(home, capsys):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("a" * 64)
    path.chmod(0o644)
    auth.ensure_token()
    assert mode(path) == 0o600
    assert path.read_text() == "a" * 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "could be read by other users" in line


def test_a_configured_token_is_not_changed(home, monkeypatch):
    path = home / "secret"
    path.write_text("b" * 64)
    path.chmod(0o644)
    monkeypatch.setenv(auth.PATH, str(path))
    auth.ensure_token()
    assert mode(path) == 0o644
    assert auth.token() == "b" * 64
    path.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        auth.ensure_token()
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        auth.ensure_token()
    monkeypatch.setenv(auth.TOKEN, "c" * 64)
    auth.ensure_token()
    assert auth.token() == "c" * 64


def test_no_token_is_created_if_authentication_is_disabled(home, monkeypatch):
    monkeypatch.setenv(auth.MODE, "disabled")
    auth.ensure_token()
    assert auth.token() is None
    assert list(home.iterdir()) == []


def test_a_private_folder_is_made_private_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(private, "PARENT", tmp_path)
    folder = private.private_folder("ray")
    assert mode(folder) == mode(private.private_root()) == 0o700
    folder.chmod(0o755)
    assert mode(private.private_folder("ray")) == 0o700
    folder.rmdir()
    # A link that another user placed there, to redirect the files.
    folder.symlink_to(tmp_path)
    with pytest.raises(CommandFailed, match="not a folder of this user"):
        private.private_folder("ray")
    folder.unlink()
    folder.write_text("a file")
    with pytest.raises(CommandFailed, match="not a folder of this user"):
        private.private_folder("ray")
    # The import falls back to a folder in the home directory instead of failing.
    (private.private_root() / "inductor").symlink_to(tmp_path)
    monkeypatch.delenv(private.COMPILED, raising=False)
    private.set_privacy_environment()
    assert Path(os.environ[private.COMPILED]).is_relative_to(Path.home())


def test_only_this_users_note_of_a_running_ray_is_trusted(tmp_path, monkeypatch):
    note = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(ray_internals, "address_file", lambda: note)
    assert ray_address._noted_address() is None
    note.write_text("10.0.0.1:6379\n")
    assert ray_address._noted_address() == "10.0.0.1:6379"
    note.unlink()
    note.symlink_to("/etc/hostname")
    assert ray_address._noted_address() is None
    note.unlink()
    os.mkfifo(note)
    assert ray_address._noted_address() is None
    if os.getuid() == 0:
        note.unlink()
        note.write_text("10.0.0.1:6379\n")
        os.chown(note, 65534, -1)
        assert ray_address._noted_address() is None


def test_the_note_of_a_ray_that_has_ended_is_removed(tmp_path, monkeypatch, capsys):
    note = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(ray_internals, "address_file", lambda: note)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    note.write_text("127.0.0.1:9")
    assert not connect.join_running()
    assert not note.exists()
    said = capsys.readouterr().err
    assert said == f"Ray at 127.0.0.1:9 has ended; removing its address file {note}.\n"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match="where no Ray responds"):
        connect.join_running()


@pytest.mark.parametrize(
    "name", ["/bundle/../evil", "/bundle/a/../../evil", "/bundle//evil", "/other/x", "/bundle/."]
)
def test_a_file_name_that_leads_out_of_a_bundle_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="leads out of the folder '/bundle/'"):
        commit._below(tmp_path, name, "/bundle/")


def test_a_bundle_at_a_url_is_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(private, "PARENT", tmp_path)
    memory = fsspec.filesystem("memory")
    for name in ("manifest.json", "variants/fp32/model.onnx"):
        memory.pipe_file(f"/fetched/{name}", name.encode())
    path = commit.fetch("memory://fetched", "manifest.json")
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert files == ["manifest.json", "variants/fp32/model.onnx"]
    assert path.is_relative_to(private.private_root())
    with pytest.raises(UserError, match="incomplete"):
        commit.fetch("memory://nothing", "manifest.json")


@pytest.mark.parametrize(
    "module",
    [
        "train.bundle.engines.onnx_runtime",
        "train.compress.recipes.quantize_static",
        "train.bundle.registry",
    ],
)
def test_libraries_send_no_telemetry_and_cache_privately(module, tmp_path):
    code = f"""
import importlib, os, tempfile
from cluster import private
from pathlib import Path
private.PARENT = Path(tempfile.gettempdir())
importlib.import_module("{module}")
from mlflow.telemetry.utils import is_telemetry_disabled
from torch._inductor.runtime.cache_dir_utils import cache_dir
assert is_telemetry_disabled()
print(cache_dir())
"""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {*private.NO_TELEMETRY, private.COMPILED, "CI", "XDG_CACHE_HOME"}
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=kept | {"HOME": str(home), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=True,
    )
    (cache,) = done.stdout.split()
    assert Path(cache).parent.parent == temporary
    assert mode(Path(cache).parent) == 0o700
    # onnxruntime would store a device id and a queue of reports below the home folder.
    assert [file for file in home.rglob("*") if "microsoft" in str(file).lower()] == []
    assert [path.name for path in temporary.iterdir()] == [private.private_root().name]


@pytest.mark.skipif(os.getuid() != 0, reason="another user is needed")
def test_the_token_is_not_sent_to_another_user_of_this_machine():
    code = (
        "import os, socket\nos.setuid(65534)\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print(server.getsockname()[1], flush=True)\n"
        "server.accept()\nprint('asked', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        assert ray_address._is_of_another_user("127.0.0.1", port)
        assert not ray_address.answers(f"127.0.0.1:{port}")
        # accept() takes connections in order, so an earlier call would have printed "asked".
        process.kill()
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()
    with socket.create_server(("127.0.0.1", 0)) as own:
        assert not ray_address._is_of_another_user(*own.getsockname())
