"""A replica's part in a rollout: copies of requests, or some clients, go to the candidate."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from serve.errors import RequestError
from serve.inference.dataplane import DataPlane
from serve.inference.request_options import RequestOptions
from serve.replica.report_buffer import ReportBuffer
from serve.requestlog.sampling import ROLLOUT, in_fraction
from serve.rollout.verdict import CANARY, ArmStats
from serve.state import Rollout
from train.tasks import Arrays, Columns

logger = logging.getLogger(__name__)

# Most copies in progress at the same time; further requests are not copied.
MAX_COPIES = 16
# Relative difference up to which two values agree.
TOLERANCE = 0.05


class TrafficSplitter:
    """Computes predictions for requests that name no version, during one phase of a rollout.

    Belongs to one event loop.
    """

    def __init__(
        self,
        rollout: Rollout,
        production: DataPlane,
        candidate: DataPlane,
        reports: ReportBuffer,
        record_copy: Callable[[str, str, Arrays], None],
        timeout_s: float,
    ) -> None:
        """Set the versions to compare.

        reports: receives the comparison. record_copy: called with request id, version and
        predictions when a copy is done. timeout_s: time limit of a copy in seconds.
        """
        self._rollout, self._production, self._candidate = rollout, production, candidate
        self._reports, self._record_copy = reports, record_copy
        self._timeout_s = timeout_s
        self._copies: set[asyncio.Task[None]] = set()

    async def split(
        self, columns: Columns, options: RequestOptions, request_id: str
    ) -> tuple[DataPlane, Arrays]:
        """Return the data plane that computed the predictions, and the predictions.

        The predictions are arrays of shape [N, …], one row per record. The client's name decides
        the version, so that each client always gets the same one. Raises the errors of
        production's `DataPlane.predict`.
        """
        production, candidate = self._production, self._candidate
        canary = self._rollout.phase == CANARY
        failed = False
        if canary and in_fraction(options.client or request_id, self._rollout.fraction, ROLLOUT):
            predictions, failed = await self._predict_canary(columns, options)
            if predictions is not None:
                self._copy(production, columns, options, predictions, request_id)
                return candidate, predictions
        began = time.perf_counter()
        predictions = await production.predict(columns, options)
        self._arm(production).answered(time.perf_counter() - began)
        if failed:
            # Counted only now, because production's success shows that the request was valid.
            self._arm(candidate).failed()
        if not canary and in_fraction(request_id, self._rollout.fraction, ROLLOUT):
            self._copy(candidate, columns, options, predictions, request_id)
        return production, predictions

    async def _predict_canary(
        self, columns: Columns, options: RequestOptions
    ) -> tuple[Arrays | None, bool]:
        """Return the candidate's predictions, or None and whether the candidate may be at fault."""
        candidate = self._candidate
        began = time.perf_counter()
        now = asyncio.get_running_loop().time()
        try:
            # Half of the time is left for production, which takes over if the candidate fails.
            async with asyncio.timeout_at(now + (options.deadline - now) / 2):
                predictions = await candidate.predict(columns, options)
        except RequestError:
            return None, False
        except Exception as error:
            logger.warning("candidate %s failed: %s", candidate.version, error)
            return None, True
        self._arm(candidate).answered(time.perf_counter() - began)
        return predictions, False

    def _copy(
        self,
        plane: DataPlane,
        columns: Columns,
        options: RequestOptions,
        expected: Arrays,
        request_id: str,
    ) -> None:
        """Run the other version on the same records; compare its predictions with `expected`."""
        if len(self._copies) >= MAX_COPIES:
            return
        compared = self._compare(plane, columns, options, expected, request_id)
        task = asyncio.get_running_loop().create_task(compared)
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _compare(
        self,
        plane: DataPlane,
        columns: Columns,
        options: RequestOptions,
        expected: Arrays,
        request_id: str,
    ) -> None:
        began = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            predictions = await plane.predict(columns, replace(options, deadline=deadline))
        except RequestError:
            return  # The server is too busy for copies.
        except Exception as error:
            logger.warning("version %s failed: %s", plane.version, error)
            self._arm(plane).failed()
            return
        self._arm(plane).answered(time.perf_counter() - began)
        agreed_N = _agree(expected, predictions)
        comparison = self._reports.comparison(self._rollout.candidate)
        comparison.rows += len(agreed_N)
        comparison.agreed += int(agreed_N.sum())
        self._record_copy(request_id, plane.version, predictions)

    def _arm(self, plane: DataPlane) -> ArmStats:
        arms = self._reports.comparison(self._rollout.candidate).arms
        return arms["candidate" if plane is self._candidate else "production"]


def _agree(one: Arrays, other: Arrays) -> np.ndarray:
    """Return whether the labels of each row are equal, or its values nearly so; bool [N]."""
    if "label" in one:
        agreed_N: np.ndarray = np.asarray(one["label"] == other["label"], bool)
        return agreed_N
    return np.isclose(one["value"], other["value"], rtol=TOLERANCE)
