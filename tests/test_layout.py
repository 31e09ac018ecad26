"""Rules of the code base: import order, small folders and modules, unique public names."""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.server import REPOSITORY

PACKAGES = ("cluster", "train", "tune", "serve")

# Package → the packages of this project that it may import. The longest matching name decides.
ALLOWED = {
    "cluster": {"cluster"},
    "train.values": {"train.values"},
    "train.tasks": {"cluster", "train.metrics", "train.tasks"},
    "train.bundle": {"cluster", "train.tasks", "train.bundle"},
    "train.config": {"cluster", "train.tasks", "train.metrics", "train.config"},
    "train.cli": {"cluster", "train.config"},
    "train.decision": {"cluster", "train.config", "train.stats", "train.tasks"},
    # Imports only numpy; training and serving share these statistics.
    "train.stats": set(),
    "train.metrics": set(),
    # Used by training and by offline inference.
    "train.data.reading": {"cluster", "train.tasks", "train.data.reading"},
    "train.nets": {"cluster", "train.tasks", "train.bundle", "train.config", "train.nets"},
    # Files only, without torch.
    "train.nets.pretrained.checkpoints": {"cluster"},
    "train.nets.pretrained.hub": {"cluster", "train.nets.pretrained.checkpoints"},
    "train.data": {
        "cluster",
        "train.tasks",
        "train.bundle",
        "train.config",
        "train.data",
        *("train.nets.pretrained.checkpoints", "train.nets.pretrained.hub"),
        *("train.decision", "train.stats", "train.telemetry"),
    },
    "train.telemetry": {
        *("cluster", "train.tasks", "train.config", "train.telemetry"),
    },
    "train.loop": {
        *("cluster", "train.tasks", "train.bundle", "train.config", "train.nets", "train.data"),
        *("train.telemetry", "train.distributed", "train.loop"),
    },
    "train.distributed": {
        *("cluster", "train.tasks", "train.bundle", "train.config", "train.nets", "train.data"),
        *("train.telemetry", "train.loop", "train.distributed"),
    },
    "train.compress": {
        *("cluster", "train.tasks", "train.bundle", "train.config", "train.nets", "train.data"),
        *("train.telemetry", "train.loop", "train.distributed", "train.reports"),
        *("train.stats", "train.compress"),
    },
    "train.reports": {
        *("train.tasks", "train.bundle", "train.config", "train.stats", "train.telemetry"),
        *("train.metrics", "train.reports"),
    },
    "train.bundle.__main__": {"cluster", "train"},
    "train.compress.__main__": {"cluster", "train"},
    "train.importing": {
        *("cluster", "train.tasks", "train.bundle", "train.config", "train.nets", "train.data"),
        *("train.compress", "train.reports", "train.importing"),
    },
    "train.training": {"cluster", "train"},
    "train": {"cluster", "train"},
    "tune": {"cluster", "train", "tune"},
    "serve": {
        *("cluster", "train.tasks", "train.bundle", "train.data.reading"),
        *("train.stats", "serve"),
    },
}
# A package that may import train.tasks may also import the values of its records.
for _allowed in ALLOWED.values():
    if "train.tasks" in _allowed:
        _allowed.add("train.values")
# Exceptions for import strings: (module, module that its string names).
IMPORT_STRINGS = {
    # Ray Serve imports the middleware in its own processes.
    ("cluster.serve_environment", "serve.http.gateway"),
    # The table of engines names the torch engine, which needs the nets.
    ("train.bundle.engines", "train.nets.torch_engine"),
}
IMPORT_STRING = re.compile(r"(?:cluster|train|tune|serve)(?:\.\w+)*[.:]\w+")

MAX_MODULES = 12
MAX_LINES = 300
MAX_TEST_NAME = 60
# Longer modules, and why they stay in one piece.
LONG_MODULES = {
    "train.loop.loop": "the training loop, which is read from top to bottom",
}
# Conventional names that several modules define.
SHARED_NAMES = {"main", "parse", "encode", "decode"}


def paths() -> list[Path]:
    return sorted(path for part in PACKAGES for path in (REPOSITORY / part).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in paths()}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_of(name: str) -> str | None:
    """Return the module of this project that a dotted name is or belongs to."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def imports(path: Path) -> set[str]:
    """Return the names that a module imports from this project, as package.module.name."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in {*PACKAGES, "tests"}}


def import_strings(path: Path) -> set[str]:
    """Return the strings in a module that are import paths of this project."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            value = node.value
            if IMPORT_STRING.fullmatch(value) and _resolves(value):
                found.add(value.replace(":", "."))
    return found


def _resolves(value: str) -> bool:
    """Return whether a string is MODULE:ATTRIBUTE, MODULE.ATTRIBUTE or MODULE, not an option."""
    module, separator, _ = value.partition(":")
    return (
        module in modules() if separator else module_of(value) in {value, value.rpartition(".")[0]}
    )


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def folder(module: str) -> str:
    """Return the unit of a module in the check for import cycles: its folder or itself.

    A module directly in a package is its own unit: some of these modules are imported by the
    folders (`train.config`), others import the folders (`train.training`).
    """
    parent = ".".join(modules()[module].relative_to(REPOSITORY).parent.parts)
    return module if parent in PACKAGES else parent


@pytest.mark.parametrize("path", paths(), ids=module_name)
def test_a_module_imports_only_its_allowed_packages(path):
    module = module_name(path)
    package = max((name for name in ALLOWED if below(module, name)), key=len)
    strings = {
        name for name in import_strings(path) if (module, module_of(name)) not in IMPORT_STRINGS
    }
    for name in imports(path) | strings:
        assert any(below(name, allowed) for allowed in ALLOWED[package]), f"{module} → {name}"


def in_circles(edges: dict[str, set[str]]) -> set[str]:
    """Return the nodes of a graph that lie on a cycle or lead to one."""
    left = set(edges)
    while done := {unit for unit in left if not edges[unit] & left}:
        left -= done
    return left


def test_folders_have_no_circular_imports():
    edges = defaultdict(set)
    for module, path in modules().items():
        if module.endswith(".__main__"):  # a command, which nothing imports
            continue
        for name in imports(path):
            target = module_of(name)
            if target and folder(target) != folder(module):
                edges[folder(module)].add(folder(target))
    assert not in_circles(edges)


def test_modules_have_no_circular_imports():
    """Imports inside functions do not count."""
    edges = defaultdict(set)
    for module, path in modules().items():
        for node in tree(path).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                edges[module] |= {module_of(name) for name in names} - {module, None}
    assert not in_circles(edges)


def test_no_folder_holds_more_than_twelve_modules():
    count = Counter(path.parent for path in paths() if path.name != "__init__.py")
    assert {str(path): number for path, number in count.items() if number > MAX_MODULES} == {}


def test_no_module_is_longer_than_three_hundred_lines():
    long = {
        module
        for module, path in modules().items()
        if len(path.read_text().splitlines()) > MAX_LINES
    }
    assert long == set(LONG_MODULES)


def test_a_public_name_is_defined_in_one_module_only():
    where = defaultdict(list)
    for module, path in modules().items():
        for node in tree(path).body:
            named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if named and not node.name.startswith("_"):
                where[node.name].append(module)
    assert {name for name, found in where.items() if len(found) > 1} <= SHARED_NAMES


def test_import_strings_of_manifests_and_configs_resolve():
    tracked = subprocess.run(
        ["git", "ls-files", "*.yaml"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    checked = 0
    for name in tracked:
        for document in yaml.safe_load_all((REPOSITORY / name).read_text()):
            for value in leaves(document):
                module, separator, attribute = value.partition(":")
                if separator and IMPORT_STRING.fullmatch(value) and module in modules():
                    defined = {getattr(node, "name", None) for node in tree(modules()[module]).body}
                    assert attribute in defined, f"{name}: {value}"
                    checked += 1
    assert checked >= 3


def leaves(value):
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize(
    "package",
    [
        *(
            "train.bundle",
            "train.tasks",
            "serve.inference.dataplane",
            "serve.http.console",
            "serve.offline.__main__",
        ),
        "serve.requestlog.writer",
    ],
)
def test_serving_imports_neither_torch_nor_mlflow(package):
    code = (
        f"import sys; sys.modules['torch'] = None; sys.modules['mlflow'] = None\nimport {package}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_top_level_has_only_the_agreed_folders():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert folders <= {".ci", "cluster", "train", "tune", "serve", "k8s", "tests", "docs"}


def test_folders_mirror_the_packages():
    tests = REPOSITORY / "tests"
    for path in tests.rglob("test_*.py"):
        folder = path.parent.relative_to(tests)
        assert (REPOSITORY / folder).is_dir(), path


def test_test_names_are_short():
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name) <= MAX_TEST_NAME, node.name
