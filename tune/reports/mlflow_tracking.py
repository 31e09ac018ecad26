"""Tracking of a study in MLflow: a run for the study, with a child run for each ended trial.

A separate thread writes to MLflow, so that the search does not wait for it.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train.bundle import Bundle, publishing
from train.bundle.publishing import RunRecorder
from tune.run.study_store import Study
from tune.run.trial_record import Trial

TRACKED = "tracked.json"
STATUS = {"complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflowTracking:
    """Tracks a study while its block runs. A continued study keeps its run in MLflow.

    The search does not depend on tracking: after a failure, one line is printed and tracking ends.
    """

    def __init__(self, study: Study, root: str) -> None:
        config = study.config
        self._study, self._root = study, root
        self._name, self._enabled = config.name, config.registry.enabled
        # Ids of the runs in MLflow: of the study, and of its trials by number.
        self._known = study.read(TRACKED) or {"run_id": None, "trials": {}}
        self._parent = RunRecorder(
            root,
            config.name,
            config.model_dump(mode="json"),
            tags={"mlflow.runName": f"study {study.name}", "study": study.name},
            run_id=self._known["run_id"],
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracking")

    def __enter__(self) -> "MLflowTracking":
        self._parent.__enter__()
        self._later(self._begin)
        for trial in self._study.trials:
            if trial.ended and str(trial.number) not in self._known["trials"]:
                self.ended(trial)
        return self

    def __exit__(self, *problem: Any) -> None:
        self._later(lambda: self._parent.__exit__(*problem)).result()
        self._thread.shutdown(wait=True)

    def look(self) -> None:
        pass

    def ended(self, trial: Trial) -> None:
        self._later(lambda: self._track(trial))

    def add(self, folder: Path) -> None:
        """Add the files of a folder to the study's run."""

        def log() -> None:
            client, run_id = self._parent.begin()
            client.log_artifacts(run_id, str(folder), "report")

        self._later(log).result()

    def publish(
        self,
        bundle: Bundle,
        metric: str,
        figure: float | None,
        score: Callable[[Bundle, str], float],
        *,
        candidate: str | None = None,
    ) -> dict[str, Any]:
        """Register the winner's bundle in a child run of the study; see `publishing.publish`."""
        self._later(lambda: None).result()
        _, parent = self._parent.begin()
        tags = {"mlflow.parentRunId": parent, "study": self._study.name}
        with RunRecorder(self._root, self._name, bundle.manifest.config, tags=tags) as recording:
            return publishing.publish(
                bundle,
                recording,
                self._root,
                metric,
                figure=figure,
                score=score,
                candidate=candidate,
            )

    def _begin(self) -> None:
        client, run_id = self._parent.begin()
        client.update_run(run_id, status="RUNNING")
        self._note(run_id)

    def _note(self, run_id: str, trial: Trial | None = None) -> None:
        if trial is None:
            self._known["run_id"] = run_id
        else:
            self._known["trials"][str(trial.number)] = run_id
        self._study.write(TRACKED, self._known)

    def _track(self, trial: Trial) -> None:
        from mlflow.entities import Metric, Param

        client, parent = self._parent.begin()
        recording = RunRecorder(
            self._root,
            self._name,
            trial.values,
            tags={
                "mlflow.parentRunId": parent,
                "mlflow.runName": f"{self._study.name} {trial.name}",
                "study": self._study.name,
                "trial": str(trial.number),
                "state": trial.state,
                **({"cause": trial.cause[:500]} if trial.cause else {}),
            },
        )
        _, run_id = recording.begin()
        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now_ms, int(row["epoch"]))
            for row in trial.rows
            for name, value in row.items()
            if name != "epoch"
        ]
        if trial.state == "complete":
            measured = self._study.measured(trial)
            metrics += [
                Metric(f"objective/{name.replace('@', '_at_')}", value, now_ms, 0)
                for name, value in measured.items()
            ]
        for start in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics[start : start + 1000])
        if trial.takeovers:
            took = ", ".join(f"epoch {each.epoch}: {each.donor}" for each in trial.takeovers)
            client.log_batch(run_id, params=[Param("took over from", took[:500])])
        client.set_terminated(run_id, STATUS[trial.state])
        self._note(run_id, trial)

    def _later(self, work: Callable[[], None]) -> "Future[None]":
        def attempt() -> None:
            if not self._enabled:
                return
            try:
                work()
            except Exception as error:  # tracking servers and databases raise errors of many kinds
                self._enabled = False
                line = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"MLflow failed, so the study is no longer tracked: {line}", file=sys.stderr)

        return self._thread.submit(attempt)
