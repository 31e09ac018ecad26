"""Runs training as a child process or a Ray job, without importing training code."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster import connect
from cluster.errors import CommandFailed, UserError

SCRIPT = "train/main.py"
POLL_S = 2.0
# Last lines of a failed job's log that are printed.
SHOWN_LINES = 20


def run_training(config_url: str, submit: str | None, timeout_s: float) -> dict[str, Any]:
    """Run training with a config file and wait for its end; return the JSON object that it prints.

    submit: address of a Ray dashboard to run it as a job; None for a child process, which joins the
    cluster at RAY_ADDRESS. timeout_s: limit in seconds. Raises CommandFailed if training fails or
    exceeds the limit, UserError if no dashboard responds at the address.
    """
    if submit is None:
        return _as_child(config_url, timeout_s)
    return _as_job(config_url, submit, timeout_s)


def parse_result(output: str) -> dict[str, Any]:
    """Return the last training result among the lines of an output. Raises CommandFailed."""
    for line in reversed(output.splitlines()):
        try:
            result = json.loads(line)
        except ValueError:
            continue
        if isinstance(result, dict) and "bundle" in result:
            return result
    raise CommandFailed("training ended without its JSON line.")


def _as_child(config_url: str, timeout_s: float) -> dict[str, Any]:
    """Run training as a child process, whose progress goes to this process's stderr."""
    script = str(Path(connect.REPOSITORY, SCRIPT))
    try:
        done = subprocess.run(
            [sys.executable, script, "--config", config_url],
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"training took longer than {timeout_s / 3600:g} hours.") from error
    if done.returncode != 0:
        raise CommandFailed(
            f"training ended with exit code {done.returncode}; its messages are above."
        )
    return parse_result(done.stdout)


def _as_job(config_url: str, address: str, timeout_s: float) -> dict[str, Any]:
    connect.set_ray_environment()
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"--submit is '{address}', but no Ray dashboard responds there "
            f"({' '.join(str(error).split())[:200]}); give its address, or omit --submit."
        ) from error
    job = client.submit_job(
        entrypoint=shlex.join(["python", SCRIPT, "--config", config_url]),
        runtime_env={"working_dir": "."},
    )
    print(f"training runs as Ray job {job}", file=sys.stderr)
    deadline = time.monotonic() + timeout_s
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise CommandFailed(
                f"training, Ray job {job}, took longer than {timeout_s / 3600:g} hours."
            )
        time.sleep(POLL_S)
    logs = client.get_job_logs(job)
    if status != JobStatus.SUCCEEDED:
        print("\n".join(logs.splitlines()[-SHOWN_LINES:]), file=sys.stderr)
        raise CommandFailed(f"training, Ray job {job}, ended with status {status}.")
    return parse_result(logs)
