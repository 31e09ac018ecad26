"""Trials: a replica's part of a rollout. The candidate is asked beside production, or before it."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from serve.admission import Terms
from serve.dataplane import DataPlane
from serve.errors import RequestError
from serve.monitor.rollout import CANARY, Comparison, chosen
from serve.served import Trial
from train.tasks import Arrays, Columns

logger = logging.getLogger(__name__)

# Copies under way at once; more requests are not copied.
MAX_COPIES = 16
# A value that differs by less agrees.
TOLERANCE = 0.05

Answered = Callable[[str, str, Arrays], None]


class Trials:
    """Asks the candidate of a trial. Belongs to one event loop."""

    def __init__(self, answered: Answered, timeout_s: float) -> None:
        """answered: told of what a copy was answered: request id, version, predictions.

        timeout_s: how long a copy may take.
        """
        self._answered = answered
        self._timeout_s = timeout_s
        self._comparison: Comparison | None = None
        self._copies: set[asyncio.Task[None]] = set()

    def drained(self) -> Comparison | None:
        """What was compared since it was asked last."""
        comparison, self._comparison = self._comparison, None
        return comparison

    async def infer(
        self,
        trial: Trial,
        planes: tuple[DataPlane, DataPlane],
        columns: Columns,
        terms: Terms,
        key: str,
        request_id: str,
    ) -> tuple[DataPlane, Arrays]:
        """Answer by one of (production, candidate); return which, and the predictions.

        key: by which clients are told apart. Raises what production does.
        """
        production, candidate = planes
        told = self._of(trial)
        failed = False
        if trial.phase == CANARY and chosen(key, trial.share):
            predictions, failed = await self._canary(told, candidate, columns, terms)
            if predictions is not None:
                self._copy(told, production, columns, terms, predictions, request_id)
                return candidate, predictions
        began = time.perf_counter()
        predictions = await production.infer(columns, terms)
        told.sides["production"].answered(time.perf_counter() - began)
        if failed:
            # Not before production has shown that the request was not at fault.
            told.sides["candidate"].failed()
        if trial.phase != CANARY and chosen(request_id, trial.share):
            self._copy(told, candidate, columns, terms, predictions, request_id)
        return production, predictions

    async def _canary(
        self, told: Comparison, candidate: DataPlane, columns: Columns, terms: Terms
    ) -> tuple[Arrays | None, bool]:
        """Return the candidate's predictions, or None and whether that may be its failure."""
        began = time.perf_counter()
        now = asyncio.get_running_loop().time()
        try:
            # The other half of the time is production's, should it be needed.
            async with asyncio.timeout_at(now + (terms.deadline - now) / 2):
                predictions = await candidate.infer(columns, terms)
        except RequestError:
            return None, False
        except Exception as error:
            logger.warning("candidate %s failed: %s", candidate.version, error)
            return None, True
        told.sides["candidate"].answered(time.perf_counter() - began)
        return predictions, False

    def _copy(
        self,
        told: Comparison,
        plane: DataPlane,
        columns: Columns,
        terms: Terms,
        expected: Arrays,
        request_id: str,
    ) -> None:
        """Ask the other version, too; its answer is compared with the one that was given."""
        if len(self._copies) >= MAX_COPIES:
            return
        asked = self._asked(told, plane, columns, terms, expected, request_id)
        task = asyncio.get_running_loop().create_task(asked)
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _asked(
        self,
        told: Comparison,
        plane: DataPlane,
        columns: Columns,
        terms: Terms,
        expected: Arrays,
        request_id: str,
    ) -> None:
        side = told.sides["candidate" if plane.version == told.candidate else "production"]
        began = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            predictions = await plane.infer(columns, replace(terms, deadline=deadline))
        except RequestError:
            return  # there is no time for copies
        except Exception as error:
            logger.warning("version %s failed: %s", plane.version, error)
            side.failed()
            return
        side.answered(time.perf_counter() - began)
        agreed_N = _agree(expected, predictions)
        told.rows += len(agreed_N)
        told.agreed += int(agreed_N.sum())
        self._answered(request_id, plane.version, predictions)

    def _of(self, trial: Trial) -> Comparison:
        if self._comparison is None or self._comparison.candidate != trial.candidate:
            self._comparison = Comparison(trial.candidate)
        return self._comparison


def _agree(one: Arrays, other: Arrays) -> np.ndarray:
    """Whether each row has the same label, or nearly the same value."""
    if "label" in one:
        agreed_N: np.ndarray = np.asarray(one["label"] == other["label"], bool)
        return agreed_N
    return np.isclose(one["value"], other["value"], rtol=TOLERANCE)
