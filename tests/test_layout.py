"""Imports go one way, and each part does without what it must do without."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import REPOSITORY

# Package → the packages of ours that it may import. Longest name first decides.
ALLOWED = {
    "cluster": {"cluster"},
    "train.tasks": {"cluster", "train.tasks"},
    "train.bundle": {"cluster", "train.tasks", "train.bundle"},
    "train.config": {"cluster", "train.tasks", "train.config"},
    "train.commandline": {"cluster", "train.config"},
    # Read by training and by offline inference alike.
    "train.data.formats": {"cluster", "train.tasks"},
    "train.data.sources": {"cluster", "train.tasks", "train.data.formats"},
    "train.nets": {"cluster", "train.tasks", "train.bundle", "train.config", "train.nets"},
    "train.data": {"cluster", "train.tasks", "train.bundle", "train.config", "train.data"},
    "train.loop": {
        *("cluster", "train.tasks", "train.bundle", "train.config"),
        *("train.nets", "train.data", "train.loop"),
    },
    "train.compress": {
        *("cluster", "train.tasks", "train.bundle", "train.config", "train.report"),
        *("train.nets", "train.data", "train.loop", "train.compress"),
    },
    "train.report": {"train.tasks", "train.bundle"},
    "train.card": {"train.tasks", "train.bundle", "train.config", "train.card"},
    "train.compress.__main__": {"cluster", "train"},
    "train.fit": {"cluster", "train"},
    "train": {"cluster", "train"},
    "tune": {"cluster", "train", "tune"},
    "serve": {
        "cluster",
        "train.tasks",
        "train.bundle",
        "train.data.sources",
        "train.data.formats",
        "serve",
    },
}
OURS = {"cluster", "train", "tune", "serve", "tests"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


def modules() -> list[Path]:
    return sorted(
        path
        for part in ("cluster", "train", "tune", "serve")
        for path in (REPOSITORY / part).rglob("*.py")
    )


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_module_imports_only_what_stands_before_it(path):
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    package = max((name for name in ALLOWED if below(module, name)), key=len)
    for name in imports(path):
        assert any(below(name, allowed) for allowed in ALLOWED[package]), f"{module} → {name}"


@pytest.mark.parametrize(
    "package",
    [
        *("train.bundle", "train.tasks", "serve.dataplane", "serve.console", "serve.offline"),
        "serve.monitor.requestlog",
    ],
)
def test_serving_needs_no_torch(package):
    code = (
        f"import sys; sys.modules['torch'] = None; sys.modules['mlflow'] = None\nimport {package}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_top_level_holds_the_agreed_folders_only():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert folders <= {".ci", "cluster", "train", "tune", "serve", "k8s", "tests"}
