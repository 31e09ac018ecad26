"""The functions that compute predictions for requests, composed when a state is installed."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from serve.config import ServeConfig
from serve.inference.dataplane import DataPlane
from serve.inference.request_options import RequestOptions
from serve.replica.report_buffer import ReportBuffer
from serve.replica.traffic_split import TrafficSplitter
from serve.requestlog.schema import LogEntry
from serve.requestlog.writer import RequestLog
from serve.rollout.feedback import predictions_of
from serve.state import ServingState
from serve.telemetry.metrics import Snapshot
from train.tasks import Arrays, Columns

# (columns, options, request id) → the data plane that computed predictions, and the predictions.
Predict = Callable[[Columns, RequestOptions, str], Awaitable[tuple[DataPlane, Arrays]]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A version for which requests are decoded, and the function that computes predictions."""

    plane: DataPlane
    predict: Predict


class PredictionPipeline:
    """Adds the rollout and the request log to the prediction of versions.

    Belongs to one event loop. reports: observations that the replica has not yet sent to the
    repository.
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
        """Return the endpoint of each version; key None is for requests that name no version."""
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
        """Return the metrics of the request log; empty if there is no log."""
        return {} if self._log is None else self._log.snapshot(labels)

    async def close(self) -> None:
        """Write the entries of the request log that are still in memory."""
        if self._log is not None:
            await self._log.close()

    def _record_copy(self, request_id: str, version: str, predictions: Arrays) -> None:
        if self._log is not None and self._log.wants(request_id):
            self.reports.add_predictions(request_id, version, predictions_of(predictions))

    def _logged(self, predict: Predict) -> Predict:
        """Wrap `predict` to log sampled requests, and to report their predictions for feedback."""
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
