"""The data plane: the path from records to predictions, shared by all protocols."""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from serve.config import ServeConfig
from serve.drift.sampler import DriftSampler
from serve.errors import BadRequest, DeadlineExceeded, PayloadTooLarge
from serve.inference.batcher import Batcher
from serve.inference.cache import ResponseCache
from serve.inference.latency_model import LatencyModel
from serve.inference.request_options import RequestOptions
from serve.telemetry.metrics import Snapshot, VersionMetrics
from train.bundle import Bundle, Predictor
from train.bundle.manifest import Manifest
from train.tasks import Arrays, Columns, InvalidRecord, Numbers, TensorSpec, Texts
from train.tasks.columns.lists import LabelSet, Vector
from train.tasks.columns.scalars import Number
from train.values import ragged
from train.values.pictures import num_pixels

# More bytes than this are encoded in a thread, so that the event loop is not blocked.
MAX_INLINE_BYTES = 65_536


class DataPlane:
    """One variant of one version of a model, with its batcher, cache and metrics."""

    def __init__(self, predictor: Predictor, version: str, config: ServeConfig) -> None:
        self._predictor = predictor
        self._images = predictor.task.features.images
        specs = predictor.task.features.inputs
        self._lists = [spec.name for spec in specs if spec.ragged]
        encoders = predictor.task.features.encoders
        self._texts = [encoder for encoder in encoders if isinstance(encoder, Texts)]
        self._max_pixels = config.limits.max_pixels
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="encode")
        self.version = version
        self.metrics = VersionMetrics()
        manifest = predictor.bundle.manifest
        self.batcher = Batcher(
            predictor.run,
            LatencyModel.of(manifest.variants[predictor.variant], config.threads),
            max_batch_rows=config.batching.max_rows,
            max_queue_rows=config.limits.max_queue_rows,
            wait_s=config.batching.wait_ms / 1e3,
            metrics=self.metrics,
            lists=self._lists,
            by_length=config.batching.by_length,
        )
        self.sampler: DriftSampler | None = None
        if config.drift.rows_per_s:
            watched = predictor.bundle.quantities
            self.sampler = DriftSampler(predictor.task, watched, config.drift.rows_per_s)
        self._cache: ResponseCache | None = None
        if config.cache.max_bytes:
            digest = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
            identity = f"{digest} {predictor.variant}"
            self._cache = ResponseCache(
                config.cache.max_bytes, config.cache.ttl_s, identity, self.metrics
            )

    @property
    def bundle(self) -> Bundle:
        return self._predictor.bundle

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def fields(self) -> Sequence[TensorSpec]:
        """The fields of a record."""
        return self._predictor.task.features.fields

    @cached_property
    def readers(self) -> Mapping[str, Number | Vector | LabelSet]:
        """Field → the column that parses its numbers, vectors or label sets."""
        numbers = [
            each for each in self._predictor.task.features.encoders if isinstance(each, Numbers)
        ]
        return {
            column.column: column
            for each in numbers
            for column in each.columns
            if isinstance(column, Number | Vector | LabelSet)
        }

    @property
    def classes(self) -> Sequence[str] | None:
        """The class names of the probabilities; None if the model has no classes."""
        return getattr(self._predictor.task.target, "classes", None)

    @property
    def variant(self) -> str:
        return self._predictor.variant

    def warm_up(self) -> None:
        """Run batches of 1, 2, 4, … rows, so that the first requests are not slower than others."""
        golden, _ = self._predictor.bundle.golden(self.variant)
        row = {
            name: ragged.trim(array[:1]) if name in self._lists else array[:1]
            for name, array in golden.items()
        }
        rows = 1
        while rows <= self.batcher.max_batch_rows:
            self._predictor.run({name: np.repeat(array, rows, 0) for name, array in row.items()})
            rows *= 2

    async def predict(self, columns: Columns, terms: RequestOptions) -> Arrays:
        """Return the predictions for N records: output → array of shape [N, …].

        columns: every field of the model, with N values. Raises BadRequest if a record cannot be
        encoded, PayloadTooLarge if the images have too many pixels, Overloaded if there is no
        capacity, and DeadlineExceeded.
        """
        if self._cache is None:
            # Reject before encoding. With a cache, the request may need no capacity.
            self.batcher.check(len(next(iter(columns.values()))), terms)
        try:
            rows = await self._encoded(columns, terms)
        except InvalidRecord as error:
            several = error.row is not None and len(next(iter(columns.values()))) > 1
            where = f"record {error.row}: " if several else ""
            raise BadRequest(f"{where}{error}") from error
        for encoder in self._texts:
            self.metrics.long_rows += encoder.count_long(rows[encoder.kind])
        if self._cache is None:
            predictions = await self.batcher.submit(rows, terms)
        else:
            predictions = await self._cache.answer(
                rows, terms.deadline, lambda: self.batcher.submit(rows, terms)
            )
        if self.sampler is not None:
            self.sampler.saw(rows, predictions, time.monotonic())
        return predictions

    def snapshot(self, **labels: str) -> Snapshot:
        """Return the metrics since the start; `labels` are added to the usual ones."""
        return self.metrics.snapshot(
            {"model": self.name, "version": self.version, "variant": self.variant, **labels},
            queue_rows=self.batcher.waiting_rows,
            cache_bytes=self._cache.size_bytes if self._cache else 0,
        )

    async def _encoded(self, columns: Columns, terms: RequestOptions) -> Arrays:
        """Encode records; in a thread if they are large or image files, which may be small but
        contain a large image.

        Raises InvalidRecord, PayloadTooLarge if there are too many pixels, DeadlineExceeded.
        """
        encode = self._predictor.encode
        files = [columns[name] for name in self._images if _is_list(columns[name])]
        if not files and sum(map(_size_bytes, columns.values())) <= MAX_INLINE_BYTES:
            return encode(columns)
        count = len(next(iter(columns.values())))
        self.batcher.encoding_rows += count
        try:
            async with asyncio.timeout_at(terms.deadline):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(
                    self._threads, self._encoded_in_bounds, columns, files
                )
        except TimeoutError:
            raise DeadlineExceeded("the records were not encoded before the deadline.") from None
        finally:
            self.batcher.encoding_rows -= count

    def _encoded_in_bounds(
        self, columns: Columns, files: Sequence[Sequence[Any] | np.ndarray]
    ) -> Arrays:
        pixels = sum(num_pixels(file) for column in files for file in column)
        if pixels > self._max_pixels:
            raise PayloadTooLarge(
                f"the images have {pixels} pixels; at most {self._max_pixels} are accepted. Send "
                "fewer or smaller images."
            )
        return self._predictor.encode(columns)


def _is_list(values: Sequence[Any] | np.ndarray) -> bool:
    """Return whether the values are separate objects, such as files or texts."""
    return not isinstance(values, np.ndarray) or values.dtype == object


def _size_bytes(values: Sequence[Any] | np.ndarray) -> int:
    """Return the approximate size of values that are to be encoded."""
    if not _is_list(values):
        assert isinstance(values, np.ndarray)
        return values.nbytes
    return sum(len(value) if isinstance(value, str | bytes) else 64 for value in values)
