"""An HTTP client: records, columns or pandas in, predictions of the same form out."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, overload
from urllib.parse import quote

import numpy as np
import orjson
import urllib3

from serve.client import codec

if TYPE_CHECKING:
    import pandas as pd

    from train.tasks import Arrays, Record

T = TypeVar("T")

# Failures that a client may repeat without asking: a prediction changes nothing on the server.
RETRIED_STATUSES = (429, 503)
CONNECT_S = 5.0


class RequestFailed(Exception):
    """The server refused a request, or could not be reached.

    status: the HTTP status, or None if no response arrived.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Sends requests to a Halyard server. Starts nothing; may be shared between threads.

        client = Client("http://127.0.0.1:8000")
        client.predict([{"age": 22, "sex": "female"}])

    url: the server's address. model: name of the model; not needed if the server has only one.
    api_key: sent as a bearer token. timeout_s: longest wait for each response; the server learns
    it and refuses requests that it cannot answer in time. retries: how often a request is sent
    again if the connection fails or the server responds 429 or 503, after the time that the
    response's Retry-After header names, at most max_wait_s. batch_rows: most records per request.
    concurrency: most requests of one call at a time. ca_file: PEM certificates to trust instead of
    the system's. client_cert: PEM files of a client certificate and its key.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 4,
        max_wait_s: float = 30.0,
        batch_rows: int = 256,
        concurrency: int = 4,
        ca_file: str | None = None,
        client_cert: tuple[str, str] | None = None,
    ) -> None:
        for name, value in (("batch_rows", batch_rows), ("concurrency", concurrency)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s is {timeout_s}; expected more than 0 seconds.")
        self.url = url.rstrip("/")
        self._model = model
        self._timeout_s = timeout_s
        self._batch_rows, self._concurrency = batch_rows, concurrency
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        certificate, key = client_cert or (None, None)
        self._pool = urllib3.PoolManager(
            maxsize=concurrency,
            timeout=urllib3.Timeout(connect=CONNECT_S, read=timeout_s + CONNECT_S),
            retries=urllib3.Retry(
                total=retries,
                status_forcelist=RETRIED_STATUSES,
                allowed_methods=None,
                backoff_factor=0.2,
                backoff_jitter=0.1,
                backoff_max=max_wait_s,
                retry_after_max=round(max_wait_s),
                raise_on_status=False,
            ),
            ca_certs=ca_file,
            cert_file=certificate,
            key_file=key,
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The client may be used again."""
        self._pool.clear()

    @property
    def model(self) -> str:
        """Name of the model. Raises RequestFailed if the server has several and none was named."""
        if self._model is None:
            names = self.models()
            if len(names) != 1:
                raise RequestFailed(
                    f"the server at {self.url} has the models {', '.join(names) or 'none'}; name "
                    "one as Client(url, model=NAME)."
                )
            self._model = names[0]
        return self._model

    def models(self) -> list[str]:
        """Return the names of the models that this client may use. Raises RequestFailed."""
        names: list[str] = self._json("GET", "/v2/models")["models"]
        return names

    def metadata(self) -> dict[str, Any]:
        """Return inputs, outputs, versions and the served variant. Raises RequestFailed."""
        return self._json("GET", f"/v2/models/{self.model}")

    def ready(self) -> bool:
        """Whether the server responds and can predict now."""
        try:
            response = self._pool.request("GET", f"{self.url}/v2/health/ready", retries=False)
        except urllib3.exceptions.HTTPError:
            return False
        return response.status == 200

    @overload
    def predict(
        self, records: "pd.DataFrame", *, version: str | None = ..., request_id: str | None = ...
    ) -> "pd.DataFrame": ...
    @overload
    def predict(
        self,
        records: Mapping[str, Any] | np.ndarray,
        *,
        version: str | None = ...,
        request_id: str | None = ...,
    ) -> "Arrays": ...
    @overload
    def predict(
        self,
        records: "Sequence[Record | bytes]",
        *,
        version: str | None = ...,
        request_id: str | None = ...,
    ) -> list[dict[str, Any]]: ...

    def predict(
        self, records: Any, *, version: str | None = None, request_id: str | None = None
    ) -> Any:
        """Return the predictions for N records, in the order and form of the records.

        Records may be a sequence, a DataFrame, or arrays by column:

        - A sequence of records, each a mapping of columns; bytes are files such as a PNG. For a
          model with one input, a record may be its value alone. Returns a list of N dicts, such as
          {"label": "7", "probabilities": {"0": 0.01, …}} or {"value": 12.5}.
        - A pandas DataFrame. Returns a DataFrame with the same index, with a column for each
          output and, as "probabilities.CLASS", for each class.
        - A mapping of column names to arrays of N rows, or for a model with one input that array
          alone, such as uint8 [N, H, W, C]. Values travel as binary tensors. Returns a dict of
          arrays: "label" object [N], "probabilities" float32 [N, K], or "value" float32 [N].

        None and NaN are missing values. More than batch_rows records are sent as several requests.

        version: version or alias of the model; the default one if None. request_id: identifies the
        request in logs and in `feedback`; needs at most batch_rows records.

        Raises RequestFailed if the server refuses any of them or cannot be reached, ValueError for
        records that cannot be sent.
        """
        if codec.is_frame(records):
            rows = codec.frame_records(records)
            return codec.predictions_frame(
                self._predict_records(rows, version, request_id), records.index
            )
        if isinstance(records, (Mapping, np.ndarray)):
            return self._predict_columns(records, version, request_id)
        if isinstance(records, (str, bytes)) or not isinstance(records, Sequence):
            raise ValueError(
                f"records are of type {type(records).__name__}; expected a list of records, a "
                "pandas DataFrame, or arrays by column."
            )
        return self._predict_records(records, version, request_id)

    def feedback(self, request_id: str, truth: Sequence[Any]) -> dict[str, Any]:
        """Report the true labels of a request, one per record. Raises RequestFailed.

        request_id: the one given to `predict`. Needs a server with log.sample_rate above 0.
        """
        body = codec.to_json({"id": request_id, "truth": list(truth)})
        return self._json("POST", f"{self._path(None)}/feedback", body)

    def _predict_records(
        self, records: Sequence[Any], version: str | None, request_id: str | None
    ) -> list[dict[str, Any]]:
        path = f"{self._path(version, 'v1')}:predict"
        parameters = {"named": True, "timeout": self._timeout_us}

        def send(part: slice) -> list[dict[str, Any]]:
            instances = [codec.wire_record(record) for record in records[part]]
            body = codec.to_json({"instances": instances, "parameters": parameters})
            found: list[dict[str, Any]] = self._json("POST", path, body, request_id)["predictions"]
            return found

        parts = self._in_batches(len(records), request_id, send)
        return [prediction for part in parts for prediction in part]

    def _predict_columns(
        self, given: Mapping[str, Any] | np.ndarray, version: str | None, request_id: str | None
    ) -> "Arrays":
        columns = {self._only_input(): given} if isinstance(given, np.ndarray) else given
        arrays, count = codec.wire_columns(columns)
        path = f"{self._path(version)}/infer"

        def send(part: slice) -> "Arrays":
            inputs = {name: array[part] for name, array in arrays.items()}
            body, headers = codec.encode_tensors(inputs, {"timeout": self._timeout_us})
            response = self._request("POST", path, body, request_id, headers)
            return codec.decode_tensors(response.data, response.headers)

        parts = self._in_batches(count, request_id, send)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _in_batches(
        self, count: int, request_id: str | None, send: Callable[[slice], T]
    ) -> list[T]:
        if count == 0:
            raise ValueError("there are no records to predict; give at least one.")
        size = self._batch_rows
        parts = [slice(start, start + size) for start in range(0, count, size)]
        if len(parts) == 1:
            return [send(parts[0])]
        if request_id is not None:
            raise ValueError(
                f"request_id is for one request, and {count} records are sent as {len(parts)}; "
                "give a larger batch_rows or leave request_id out."
            )
        with ThreadPoolExecutor(min(self._concurrency, len(parts))) as pool:
            sent = [pool.submit(send, part) for part in parts]
            try:
                return [each.result() for each in sent]
            except BaseException:
                for each in sent:
                    each.cancel()
                raise

    def _only_input(self) -> str:
        names = [tensor["name"] for tensor in self.metadata()["inputs"]]
        if len(names) != 1:
            raise ValueError(
                f"model '{self.model}' has the inputs {', '.join(names)}; give a mapping of them."
            )
        return str(names[0])

    def _path(self, version: str | None, protocol: str = "v2") -> str:
        within = f"/versions/{quote(version, safe='')}" if version is not None else ""
        return f"/{protocol}/models/{quote(self.model, safe='')}{within}"

    @property
    def _timeout_us(self) -> int:
        return round(1e6 * self._timeout_s)

    def _json(
        self, method: str, path: str, body: bytes | None = None, request_id: str | None = None
    ) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self._request(method, path, body, request_id).data)
        return found

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request and return its response of status 200. Raises RequestFailed."""
        named = {"X-Request-ID": request_id} if request_id is not None else {}
        content = {"Content-Type": "application/json"} if body is not None else {}
        sent = {**self._headers, **content, **named, **(headers or {})}
        try:
            response = self._pool.request(method, self.url + path, body=body, headers=sent)
        except urllib3.exceptions.HTTPError as error:
            reason = str(getattr(error, "reason", None) or error).rpartition(": ")[2]
            raise RequestFailed(f"no response from {self.url}: {reason}") from error
        if response.status != 200:
            raise RequestFailed(codec.error_message(response.data), response.status)
        return response
