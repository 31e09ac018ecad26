"""Bundles are data: code that a bundle names is imported only if the operator allows it."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import UserError
from serve import config as serve_config
from serve.control import reconciler
from tests.conftest import make_config, run_main
from tests.server import REPOSITORY
from train.bundle import Bundle, CorruptBundle, registry
from train.config import bundle_config, validate_config
from train.tasks import Task, plugins

# A module in an untrusted bundle that creates a file when it is imported.
BROUGHT = """
from pathlib import Path
Path({mark!r}).touch()
class Thing:
    kind = "brought_along:Thing"
    @classmethod
    def from_dict(cls, state):
        return cls()
"""
NAME = "brought_along:Thing"


class Watch:
    """Import hook that records the name of every module that Python looks for."""

    def __init__(self):
        self.names = []

    def find_spec(self, name, path=None, target=None):
        self.names.append(name)


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    return watch


@pytest.fixture(autouse=True)
def _forgets(monkeypatch):
    monkeypatch.setattr(plugins, "_allowed", set())
    monkeypatch.setattr(plugins, "_data", set())


def rewritten(bundle, folder, changes, name="bundle"):
    """Return a copy of a bundle with changed JSON files and matching digests.

    changes: file → function of its contents.
    """
    copy = folder / name
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for file, change in changes.items():
        if file == "manifest.json":
            change(manifest)
            continue
        state = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
        content = json.dumps(change(state)).encode()
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).write_bytes(content)
        digest = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        manifest["files"][file] = digest
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def with_encoder(state):
    return {**state, "features": [{"kind": NAME}]}


def with_target(state):
    return {**state, "target": {**state["target"], "kind": NAME}}


def with_loss(state):
    return {**state, "target": {**state["target"], "loss": NAME}}


def with_task(state):
    return {**state, "kind": NAME}


def served_by_torch(manifest):
    variant = {**manifest["variants"]["fp32"], "engine": "torch", "file": "variants/t/net.json"}
    manifest["variants"] = {"t": variant}
    manifest["default_variant"] = "t"


def net(state):
    return {"precision": "fp32", "net": {"class_path": NAME}, "task": {}}


def net_of_task(state):
    return {"precision": "fp32", "net": {}, "task": {"kind": NAME, "features": []}}


HOSTILE = {
    "an encoder": {"features.json": with_encoder},
    "a target": {"features.json": with_target},
    "a loss": {"features.json": with_loss},
    "a task": {"features.json": with_task},
    "a net": {"variants/t/net.json": net, "manifest.json": served_by_torch},
    "a net's task": {"variants/t/net.json": net_of_task, "manifest.json": served_by_torch},
    "the task of the manifest": {"manifest.json": lambda m: m["task"].update(kind=NAME)},
    "a net of its options": {
        "manifest.json": lambda m: m["config"].update(net={"class_path": NAME})
    },
    "a column of its options": {
        "manifest.json": lambda m: m["config"].update(features={"image": {"kind": NAME}})
    },
    "a student of its options": {
        "manifest.json": lambda m: m["config"]["compress"]["distill"].update(
            net={"class_path": NAME}
        )
    },
    # A bundle cannot allow modules itself.
    "plugins of its own": {
        "manifest.json": lambda m: m["config"].update(
            plugins=["brought_along"], net={"class_path": NAME}
        )
    },
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bundle_that_names_code_is_refused_without_importing(
    bundle, tmp_path, monkeypatch, watch, changes
):
    copy = rewritten(bundle, tmp_path, changes)
    mark = tmp_path / "imported"
    (copy / "brought_along.py").write_text(BROUGHT.format(mark=str(mark)))
    # Like a server with its models below the working directory, which Python searches.
    monkeypatch.syspath_prepend(str(copy))
    with pytest.raises(CorruptBundle, match=r"not allowed to import brought_along:Thing") as caught:
        Bundle.load(str(copy))
    assert "plugins=brought_along" in str(caught.value)
    assert "brought_along" not in watch.names
    assert not mark.exists()


def test_code_in_a_data_folder_is_refused_even_if_allowed(bundle, tmp_path, monkeypatch):
    copy = rewritten(bundle, tmp_path, {"features.json": with_encoder})
    mark = tmp_path / "imported"
    (copy / "brought_along.py").write_text(BROUGHT.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(copy))
    plugins.allow_modules(["brought_along"], storage=str(tmp_path))
    loaded = Bundle.load(str(copy))
    with pytest.raises(ValueError, match=r"is not imported: .* is in a data folder"):
        _ = loaded.task
    assert not mark.exists()
    # In a namespace package (without __init__), such as the folder of models itself.
    monkeypatch.syspath_prepend(str(tmp_path.parent))
    plugins.allow_modules([tmp_path.name])
    with pytest.raises(ValueError, match="in a data folder"):
        plugins.import_object(f"{tmp_path.name}.{copy.name}.brought_along:Thing")
    assert not mark.exists()


def test_code_of_an_allowed_module_is_imported(bundle, tmp_path, monkeypatch):
    copy = rewritten(bundle, tmp_path / "models", {"features.json": with_encoder})
    mark = tmp_path / "imported"
    code = tmp_path / "code"
    code.mkdir()
    (code / "brought_along.py").write_text(BROUGHT.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(code))
    plugins.allow_modules(["brought_along"], storage=str(tmp_path / "models"))
    task = Bundle.load(str(copy)).task
    assert type(task.features.encoders[0]).__name__ == "Thing"
    assert mark.exists()
    sys.modules.pop("brought_along")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("os:system", "not allowed"),
        ("tests.server:subprocess", "is defined elsewhere"),
        ("tests.serverx:start", "not allowed"),
        ("tests:nothing", "not allowed"),
        ("tests.server:nothing", "cannot be imported"),
        ("tests.server.nowhere:x", "cannot be imported"),
        ("tests.server:start.__globals__", "is not a valid path"),
        ("tests.server", "is not a valid path"),
        ("../tests.server:start", "is not a valid path"),
    ],
)
def test_only_objects_defined_in_allowed_modules_are_imported(path, words):
    plugins.allow_modules(["tests.server"])
    with pytest.raises(ValueError, match=words):
        plugins.import_object(path)


def test_a_class_in_a_users_options_is_allowed_for_the_run():
    config = make_config(net="train.configs.curve_net:CurveNet")
    assert config.plugins == ("train.configs.curve_net",)
    assert plugins.is_allowed("train.configs.curve_net:CurveNet")
    assert not plugins.is_allowed("train.configs.curves:Curves")
    # The config keeps its plugins when it is sent to other processes.
    assert validate_config(config.model_dump(mode="json")).plugins == config.plugins


def test_options_stored_in_a_bundle_allow_no_modules():
    values = make_config().model_dump()
    values |= {"net": {"class_path": "train.configs.curve_net:CurveNet"}, "plugins": ["os"]}
    with pytest.raises(UserError, match="curve_net"):
        bundle_config(values)
    plugins.allow_modules(["train.configs.curve_net"])
    assert bundle_config(values, ["train.configs.curve_net"])["plugins"] == [
        "train.configs.curve_net"
    ]


def test_a_bundle_registered_under_another_name_is_refused(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(
        registry, "resolve_model", lambda uri, root: (str(bundle.path), "4") if "@" in uri else None
    )
    with pytest.raises(CorruptBundle, match=r"registered as 'taxis' version 4.* 'digits'"):
        registry.load_bundle("models:/taxis@production", str(tmp_path))
    config = serve_config.validate_options({"model": "models:/taxis@production"})
    with pytest.raises(CorruptBundle, match="registered as 'taxis'"):
        reconciler.resolve_serving_state(config)


@pytest.mark.parametrize("name", ["../evil", "a/b", "/etc", "..", "", "Digits", "a" * 64, "a\n"])
def test_a_name_with_a_path_in_it_is_refused(bundle, tmp_path, name):
    copy = rewritten(bundle, tmp_path, {"manifest.json": lambda m: m.update(name=name)})
    with pytest.raises(CorruptBundle, match="name: String should match pattern"):
        Bundle.load(str(copy))
    with pytest.raises(UserError):
        registry.resolve_model(f"models:/{name}@production", str(tmp_path))


@pytest.mark.parametrize("variant", ["../fp32", "a/b", ".hidden", ""])
def test_a_variant_with_a_path_in_its_name_is_refused(bundle, tmp_path, variant):
    def change(manifest):
        manifest["variants"][variant] = manifest["variants"]["fp32"]

    copy = rewritten(bundle, tmp_path, {"manifest.json": change})
    with pytest.raises(CorruptBundle, match=r"variants\."):
        Bundle.load(str(copy))


@pytest.mark.slow
def test_each_command_refuses_a_bundle_that_names_code(bundle, tmp_path):
    """Serving, offline inference, compression, export and warm start, as a user runs them."""
    copy = rewritten(bundle, tmp_path, {"features.json": with_encoder})
    mark = tmp_path / "imported"
    # Python searches the working directory of a command first.
    (tmp_path / "brought_along.py").write_text(BROUGHT.format(mark=str(mark)))
    environment = {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    serve = Path(sys.executable).with_name("serve")
    places = ["--output", str(tmp_path / "out"), "--storage", str(tmp_path)]
    commands = [
        [str(serve), "run", "serve.app", f"model={copy}"],
        ["-m", "serve.offline", "--model", str(copy), "--input", "x.csv", *places],
        ["-m", "train.compress", str(copy), "--storage.path", str(tmp_path)],
        ["-m", "train.compress", "export", str(copy), "--to", str(tmp_path / "edge")],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**environment, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, (command, done.stderr)
        assert "not allowed to import brought_along:Thing" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    done = run_main(["--init", str(copy), "--storage.path", str(tmp_path / "runs")])
    assert done.returncode == 2
    assert "not allowed to import brought_along:Thing" in done.stderr.splitlines()[-1]
    assert not mark.exists()


def test_a_task_state_that_names_other_code_is_refused():
    state = {
        "kind": "task",
        "features": [{"kind": "os:system"}],
        "target": {"kind": "classification"},
    }
    with pytest.raises(ValueError, match="not allowed"):
        Task.from_dict(state)
