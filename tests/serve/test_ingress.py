"""The ingress that is chosen when `serve` is imported."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.server import REPOSITORY

SHOW = "import os, serve; serve.app; print(os.environ['RAY_SERVE_ENABLE_HA_PROXY'])"


@pytest.mark.parametrize(
    ("changes", "chosen", "lines"),
    [
        ({}, "1", 0),
        ({"RAY_SERVE_HAPROXY_BINARY_PATH": "/bin/false"}, "0", 1),
        ({"RAY_SERVE_HAPROXY_BINARY_PATH": "/nowhere"}, "0", 1),
        ({"RAY_SERVE_ENABLE_HA_PROXY": "0"}, "0", 0),
    ],
)
def test_without_haproxy_rays_proxy_is_used_with_one_note(changes, chosen, lines):
    environment = {key: value for key, value in os.environ.items() if "RAY_SERVE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=REPOSITORY,
        env={**environment, **changes},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == chosen
    said = done.stderr.splitlines()
    assert len(said) == lines
    assert all("using Ray's own proxy" in line for line in said)


def test_wrapper_of_another_copy_is_not_run_as_haproxy(tmp_path):
    shutil.copytree(REPOSITORY / "cluster" / "ingress", tmp_path / "ingress")
    environment = {key: value for key, value in os.environ.items() if "HAPROXY" not in key}
    environment["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(tmp_path / "ingress" / "haproxy")
    show = (
        "import os, serve; serve.app; print(os.environ.get('HALYARD_HAPROXY'));"
        "print(os.environ['RAY_SERVE_HAPROXY_BINARY_PATH'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", show],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "None",
        str(REPOSITORY / "cluster" / "ingress" / "haproxy"),
    ]
