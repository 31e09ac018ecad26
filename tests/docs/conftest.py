"""What the tests of documented commands and of the notebook share."""

import pytest

from cluster import serve_environment
from tests.docs.workspace import copy_repository


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A copy of the repository, and the environment of a reader."""
    for name in serve_environment.variable_names():
        monkeypatch.delenv(name, raising=False)
    # As activating .venv does, which holds for the other blocks of a terminal.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    # Python otherwise prefers the packages of the repository, which are installed, to the copy's.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return copy_repository(tmp_path)
