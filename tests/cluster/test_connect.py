"""Starting Ray and waiting for it, on idle and on busy machines."""

import logging
import threading

import pytest
from ray._private import services
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import controller
from ray.train.v2._internal.execution.failure_handling import default
from ray.train.v2._internal.execution.worker_group import worker_group

from cluster import connect, ray_internals
from cluster.errors import CommandFailed
from train.distributed import waiting

TOO_SLOW = "The current node timed out during startup."


@pytest.fixture(autouse=True)
def _a_token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)


class Starts:
    """A stand-in for ray.init that succeeds after some failures."""

    def __init__(self, failures):
        self.failures, self.calls = failures, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise Exception(TOO_SLOW)


def test_ray_is_started_once_more_if_it_was_too_slow(capsys):
    init = Starts(failures=1)
    connect._start(init)
    assert init.calls == 2
    assert capsys.readouterr().err == f"Ray did not start ({TOO_SLOW}); trying once more.\n"


def test_a_second_failed_start_is_reported_in_one_line(capsys):
    init = Starts(failures=2)
    with pytest.raises(CommandFailed, match=f"Ray does not start on this machine: {TOO_SLOW}"):
        connect._start(init)
    assert init.calls == 2


def test_a_node_has_minutes_to_start_unless_it_has_died(monkeypatch):
    before = services.get_node
    answers = iter([RuntimeError, RuntimeError, "node"])

    def get_node(*arguments):
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    class Process:
        def __init__(self, *names):
            self._names = names

        def children(self):
            return [Child(name) for name in self._names]

    class Child:
        def __init__(self, name):
            self._name = name

        def name(self):
            return self._name

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr("psutil.Process", lambda: Process("gcs_server", "raylet"))
    with ray_internals.patient_start(180):
        assert services.get_node("address", "id") == "node"
    assert services.get_node is get_node
    answers = iter([RuntimeError, "node"])
    monkeypatch.setattr("psutil.Process", lambda: Process("gcs_server"))
    with ray_internals.patient_start(180), pytest.raises(RuntimeError):
        services.get_node("address", "id")
    monkeypatch.undo()
    assert services.get_node is before


def test_a_long_wait_is_reported_once(monkeypatch, capsys):
    monkeypatch.setattr(connect, "PATIENCE_S", 60)
    with connect._told("Ray to start"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(connect, "PATIENCE_S", 0)
    with connect._told("Ray to start"):
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.join(10)
    assert capsys.readouterr().err == "waiting for Ray to start; other programs are using the CPU\n"


# Waiting for a cluster that is in use.


def logged(once, caplog):
    """Return the records that a filter lets through while Ray Train starts workers three times."""
    logger = logging.getLogger(waiting.START_LOGGERS[0])
    # Training in this process, in an earlier test, has installed a filter, too.
    installed, logger.filters = logger.filters, [once]
    try:
        with caplog.at_level(logging.INFO, logger.name):
            for _ in range(3):
                logger.info("Attempting to start training worker group of size 2 with …")
                try:
                    raise WorkerGroupStartupTimeoutError(num_workers=2)
                except WorkerGroupStartupTimeoutError as error:
                    logger.exception("Error in control loop iteration: %s", error)
                logger.info("[FailurePolicy] RETRY\n  Error: %s", error_text())
            logger.error("something else")
    finally:
        logger.filters = installed
    return [(record.getMessage(), record.exc_info) for record in caplog.records]


def error_text():
    return str(WorkerGroupStartupTimeoutError(num_workers=2))


@pytest.mark.parametrize("said", [True, False])
def test_a_run_that_waits_for_room_is_reported_once(caplog, said):
    lines = [("waiting until the cluster has room for the workers", None)] * (not said)
    first = "Attempting to start training worker group of size 2 with …"
    assert logged(waiting.OnceFilter(said=said), caplog) == [
        (first, None),
        *lines,
        ("something else", None),
    ]


def test_ray_trains_loggers_have_the_expected_names():
    modules = (controller, default, worker_group)
    assert tuple(module.__name__ for module in modules) == waiting.START_LOGGERS
    assert all(module.logger.name == module.__name__ for module in modules)
    assert "startup timed out" in error_text()
