"""Training, serving and the doctor as a user runs them, and their errors for wrong input."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests import server
from tests.alone import edge_labels
from tests.conftest import run_main
from tests.serve.http.test_routes import v2_body
from tests.train.tasks.test_tasks import image_bytes
from train.compress import export_edge
from train.config import validate_config
from train.data import dataset

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Processes of Ray and HAProxy as a process list names them.
PROCESSES = ("raylet", "gcs_server", "ray::", "haproxy")


def processes():
    """Return the running processes of Ray and HAProxy: id → command."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if any(name in command.split(" -")[0] for name in PROCESSES):
                found[int(folder.name)] = command[:80]
    return found


@pytest.fixture(scope="module")
def test_split(bundle):
    config = validate_config(bundle.manifest.config)
    inputs, targets = dataset.prepare_dataset(config, config.storage.path).open("test")
    return inputs["image"], [bundle.task.target.to_dict()["classes"][index] for index in targets]


def test_training_prints_one_json_object_that_holds_the_result(trained, bundle):
    assert trained["model"] == "digits"
    assert trained["uri"] == "models:/digits@production"
    assert Path(trained["bundle"]) == bundle.path
    assert trained["metrics"]["test_accuracy"] > 0.95
    assert set(trained["variants"]) == {"fp32", "int8_static", "int8_dynamic", "int8_weights"}
    for variant in trained["variants"].values():
        assert {"accepted", "test_accuracy", "bytes", "p50_ms"} <= set(variant)
    assert bundle.manifest.variants[trained["default_variant"]].accepted


def test_a_server_handles_all_protocols_and_stops_cleanly(
    trained, bundle, test_split, storage_path, tmp_path
):
    before = processes()
    images, labels = test_split
    log = tmp_path / "serve.log"
    with server.running(f"storage={storage_path}", "replicas=2", log=log) as url:
        answer = httpx.post(f"{url}/v2/models/digits/infer", json=v2_body(images)).json()
        by_tensor = answer["outputs"][0]["data"]
        assert np.mean(np.array(by_tensor) == labels) > 0.95
        export_edge.export_edge(bundle, None, tmp_path / "edge")
        assert edge_labels(tmp_path / "edge", "image", np.array(images)) == by_tensor
        instances = [
            {"b64": base64.b64encode(image_bytes(image.squeeze())).decode()} for image in images
        ]
        answer = httpx.post(f"{url}/v1/models/digits:predict", json={"instances": instances})
        assert [row["label"] for row in answer.json()["predictions"]] == by_tensor
        assert httpx.get(f"{url}/nowhere").json().keys() == {"error"}
        haproxy = [command for command in processes().values() if "haproxy" in command]
        assert haproxy, "requests pass through HAProxy"
        assert set(httpx.get(f"{url}/v2/models/digits").json()["inputs"][0]) == {
            "name",
            "datatype",
            "shape",
        }
    assert processes().keys() <= before.keys()


def test_wrong_training_input_exits_2_with_one_line(tmp_path):
    done = run_main(["--storage.path", str(tmp_path / "runs"), "--net.widths", "[8,8,8]"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "8×8" in line
    assert not (tmp_path / "runs" / "bundles").exists()


def serve_run(*arguments):
    command = [str(Path(sys.executable).with_name("serve")), "run", "serve.app", *arguments]
    return subprocess.run(
        command, cwd=server.REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


def test_wrong_serving_input_exits_2_with_one_line(trained, bundle, tmp_path, storage_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle.path, damaged)
    with (damaged / "variants/fp32/model.onnx").open("r+b") as file:
        file.write(b"?")
    cases = [
        ([f"storage={tmp_path}/empty"], ["models:/digits@production", "train/main.py"]),
        ([f"model={damaged}"], ["variants/fp32/model.onnx", "digest"]),
        ([f"storage={storage_path}", "variant=int4"], ["int4", "fp32"]),
        (["replica=1"], ["replica", "replicas"]),
    ]
    for arguments, words in cases:
        done = serve_run(*arguments)
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        for word in words:
            assert word in line


def test_the_error_names_a_port_that_is_in_use(trained, storage_path):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((server.URL.split("/")[2].split(":")[0], 8000))
        other.listen()
        done = serve_run(f"storage={storage_path}")
    assert done.returncode == 2, done.stderr
    assert "port 8000 is taken" in done.stderr.splitlines()[-1]


def test_the_doctor_command_reports_a_healthy_machine(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "doctor", "--storage.path", str(tmp_path / "runs")],
        cwd=server.REPOSITORY,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"healthy": True}
    for subject in ("Python", "torch", "HAProxy", "port 8000", "storage"):
        assert subject in done.stderr
