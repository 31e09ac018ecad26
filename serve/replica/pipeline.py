"""How requests are answered: composed once, when a serving state is installed."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from serve.config import ServeConfig
from serve.inference.admission import RequestOptions
from serve.inference.dataplane import DataPlane
from serve.replica.report_buffer import ReportBuffer
from serve.replica.traffic_split import TrafficSplitter
from serve.requestlog.schema import LogEntry
from serve.requestlog.writer import RequestLog
from serve.rollout.feedback import predictions_of
from serve.state import ServingState
from serve.telemetry.metrics import Snapshot
from train.tasks import Arrays, Columns

# (columns, options, request id) → the version that answered, and its predictions.
Predict = Callable[[Columns, RequestOptions, str], Awaitable[tuple[DataPlane, Arrays]]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A version that requests are decoded for, and the function that answers them."""

    plane: DataPlane
    predict: Predict


class PredictionPipeline:
    """Puts the rollout and the request log around the versions. Belongs to one event loop.

    reports: the observations that the replica has not yet sent to the repository.
    """

    def __init__(self, config: ServeConfig, name: str) -> None:
        self._timeout_s = config.limits.timeout_s
        self._log: RequestLog | None = None
        if config.log.sample_rate:
            self._log = RequestLog(config.storage, name, config.log)
        self.reports = ReportBuffer()

    def compose(
        self, state: ServingState, planes: Mapping[str, DataPlane]
    ) -> dict[str | None, Endpoint]:
        """Return the endpoint of each version, and under None that of requests that name none."""
        if not state.loaded:
            return {}
        endpoints: dict[str | None, Endpoint] = {
            version: Endpoint(plane, self._logged(_single(plane)))
            for version, plane in planes.items()
        }
        default, rollout = planes[state.default], state.rollout
        endpoints[None] = endpoints[state.default]
        if rollout is not None and rollout.candidate in planes.keys() - {state.default}:
            splitter = TrafficSplitter(
                rollout,
                default,
                planes[rollout.candidate],
                self.reports,
                self._record_copy,
                self._timeout_s,
            )
            endpoints[None] = Endpoint(default, self._logged(splitter.split))
        return endpoints

    def snapshot(self, labels: dict[str, str]) -> Snapshot:
        """Return the metrics of the request log; none without one."""
        return {} if self._log is None else self._log.snapshot(labels)

    async def close(self) -> None:
        """Write the rest of the request log."""
        if self._log is not None:
            await self._log.close()

    def _record_copy(self, request_id: str, version: str, predictions: Arrays) -> None:
        if self._log is not None and self._log.wants(request_id):
            self.reports.add_predictions(request_id, version, predictions_of(predictions))

    def _logged(self, predict: Predict) -> Predict:
        """Log the requests of the sample, and report their predictions for feedback."""
        log = self._log
        if log is None:
            return predict

        async def logged(
            columns: Columns, options: RequestOptions, request_id: str
        ) -> tuple[DataPlane, Arrays]:
            if not log.wants(request_id):
                return await predict(columns, options, request_id)
            began, began_wall = time.perf_counter(), time.time()
            plane, predictions = await predict(columns, options, request_id)
            seconds = time.perf_counter() - began
            self.reports.add_predictions(request_id, plane.version, predictions_of(predictions))
            log.add(
                LogEntry(
                    request_id,
                    plane.version,
                    plane.variant,
                    began_wall,
                    seconds,
                    columns,
                    predictions,
                    plane.fields,
                    plane.readers,
                )
            )
            return plane, predictions

        return logged


def _single(plane: DataPlane) -> Predict:
    async def predict(
        columns: Columns, options: RequestOptions, request_id: str
    ) -> tuple[DataPlane, Arrays]:
        return plane, await plane.predict(columns, options)

    return predict
