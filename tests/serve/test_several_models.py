"""A server of several models behind one address, configured by serve/configs/multi.yaml."""

import base64
import io
import json
import shlex
import subprocess
import sys

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from tests import server
from tests.server import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PREDICT = "/v1/models/digits:predict"


@pytest.fixture(scope="module")
def url(trained, storage_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    config = yaml.safe_load((REPOSITORY / "serve/configs/multi.yaml").read_text())
    gateway, *models = config["applications"]
    (digits,) = [each for each in models if each["name"] == "digits"]
    gateway["args"] = {"models": ["digits"]}
    digits["args"] = {"model": "models:/digits@production", "storage": str(storage_path)}
    config["applications"] = [gateway, digits]
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    lines = subprocess.run(
        [sys.executable, "-m", "serve.environment", "--local"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    # Otherwise each replica waits for half a minute before it ends.
    environment = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}
    for line in lines:
        (pair,) = shlex.split(line.removeprefix("export "))
        name, _, value = pair.partition("=")
        environment[name] = value
    options = {"ready": "/v2/models/digits/ready", "environment": environment}
    with server.running(log=folder / "log", app=str(file), **options) as url:
        yield url


def test_the_gateway_forwards_bodies_of_many_megabytes(url):
    random = np.random.default_rng(0)
    records = []
    for _ in range(48):
        file = io.BytesIO()
        picture = random.integers(0, 256, (300, 300), dtype=np.uint8)
        Image.fromarray(picture).save(file, "PNG")
        records.append({"b64": base64.b64encode(file.getvalue()).decode()})
    body = json.dumps({"instances": records})
    assert len(body) > 5 * 2**20
    answer = httpx.post(f"{url}{PREDICT}", content=body, timeout=60)
    assert answer.status_code == 200, answer.text
    one = httpx.post(f"{url}{PREDICT}", json={"instances": records[:1]})
    assert len(answer.json()["predictions"]) == 48
    assert answer.json()["predictions"][0]["label"] == one.json()["predictions"][0]["label"]


def test_a_body_beyond_the_limit_is_refused_with_the_limit(url):
    answer = httpx.post(f"{url}{PREDICT}", content=b" " * (17 << 20), timeout=60)
    assert answer.status_code == 413
    assert "at most 16777216 are accepted" in answer.text
