"""The command blocks of README and the quickstart, run in order as a reader runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import server
from tests.server import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LIMIT_S = 380


def blocks(page):
    """The language and text of each block that a reader runs."""
    return BLOCK.findall((REPOSITORY / page).read_text())


def run(command, workspace):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        cwd=workspace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_block(language, text, workspace):
    if language == "python":
        return run([sys.executable, "-c", text], workspace)
    # Installing and testing are what runs this test.
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        run(["make", "--dry-run", "--always-make", target], workspace)
    text = re.sub(r"^make .*\n", "", text, flags=re.MULTILINE)
    return run(["bash", "-euo", "pipefail", "-c", text], workspace)


def follow(page, workspace):
    """Run the blocks of a page; return what each printed. A server runs until the next one, or
    until the end of its section."""
    printed, process = [], None
    try:
        for language, text in blocks(page):
            starts = re.search(r"^serve run serve\.app *(.*)$", text, re.MULTILINE)
            if process is not None and (starts or "cluster up" in text or language == "python"):
                server.stop(process)
                process = None
            if starts:
                arguments = starts[1].split()
                process = server.start(*arguments, log=workspace / "serve.log", cwd=workspace)
                printed.append("")
            else:
                printed.append(run_block(language, text, workspace))
    finally:
        if process is not None:
            server.stop(process)
        if "cluster up" in (REPOSITORY / page).read_text():
            # A block that failed may have left it.
            run([sys.executable, "-m", "cluster", "down"], workspace)
    return printed


def test_the_quickstart_works_as_it_is_written(workspace):
    printed = "\n".join(follow("docs/quickstart.md", workspace))
    assert '"model": "deliveries", "version": 2' in printed
    assert '"label":"yes"' in printed
    assert re.search(r"[5-9]\d\d of 1000 predictions were right", printed)
    drifted = re.search(r"drift_alarmed_windows_total\{.*\} (\d+)\.0", printed)
    assert int(drifted[1]) >= 1


def test_the_readme_works_as_it_is_written(workspace):
    printed = "\n".join(follow("README.md", workspace))
    assert '"label":"yes"' in printed
    assert "'label': 'yes'" in printed
    assert (workspace / "edge" / "model.onnx").exists()
    assert list((workspace / "predictions").glob("*.parquet"))
    with pytest.raises(httpx.TransportError):
        httpx.get("http://127.0.0.1:8000/v2/health/live")
