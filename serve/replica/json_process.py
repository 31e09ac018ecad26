"""A subprocess that decodes large JSON bodies, so that the replica's threads are not blocked.

A JSON parser holds the GIL while it builds a list of millions of values. The subprocess reads
requests from stdin, writes responses to stdout, and exits when stdin ends. Each message starts with
its length in 8 bytes. A request is a MessagePack message and a body; a response is MessagePack.
"""

import gc
import os
import resource
import struct
import subprocess
import sys
import threading
from typing import IO, Any

import msgpack
import numpy as np

from serve import errors
from serve.protocol import tensors, v1, v2
from serve.protocol.fields import UnknownFields
from serve.protocol.v2 import InferRequest
from train.bundle.manifest import Manifest

LENGTH = struct.Struct("<Q")
# MessagePack extension types: arrays of numbers, and arrays of dtype object.
NUMBERS, OBJECTS = 1, 2
NICENESS = 10
# Bytes of memory for parsed JSON, in addition to what the process uses at its start.
MAX_BYTES = 2 << 30


class JSONProcess:
    """Client of the subprocess, which it starts with the first request, and again if it exits."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def decode(
        self,
        protocol: str,
        body: bytes,
        manifest: Manifest,
        *,
        header_length: str | None,
        max_rows: int,
        max_json_bytes: int,
        unknown_fields: UnknownFields,
    ) -> InferRequest:
        """Decode a body of protocol "v1" or "v2", as the `decode` of that module. Blocks.

        Raises BadRequest and PayloadTooLarge as that function, Overloaded if the subprocess exits.
        """
        options = [header_length, max_rows, max_json_bytes, unknown_fields]
        head = _pack([protocol, manifest.model_dump_json(), options])
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _write(process.stdin, head)
                _write(process.stdin, body)
                answer = _read(process.stdout)
            except OSError:
                answer = None
            if answer is None:
                self.close()
                raise errors.Overloaded("a large request could not be decoded; try again.")
        error, message, request = _unpack(answer)
        if error:
            raise getattr(errors, error)(message)
        return InferRequest(**request)

    def close(self) -> None:
        """Kill the subprocess, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return self._process


def main() -> None:
    """Decode requests until stdin ends."""
    os.nice(NICENESS)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_BYTES, used + MAX_BYTES))
    # The collector would scan large lists in which it can free nothing.
    gc.disable()
    received, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while (head := _read(received)) is not None and (body := _read(received)) is not None:
        _write(answers, _pack(_answer(head, body)))


def _answer(head: bytes, body: bytes) -> list[Any]:
    """Return [error class, message, None], or ["", "", fields of the InferRequest]."""
    protocol, manifest_json, options = _unpack(head)
    header_length, max_rows, max_json_bytes, unknown_fields = options
    manifest = Manifest.model_validate_json(manifest_json)
    try:
        if protocol == "v1":
            found = v1.decode(body, manifest, max_rows, max_json_bytes, unknown_fields)
        else:
            found = v2.decode(
                body,
                header_length,
                manifest,
                max_rows,
                max_json_bytes,
                unknown_fields=unknown_fields,
            )
    except (errors.BadRequest, errors.PayloadTooLarge) as error:
        return [type(error).__name__, str(error), None]
    except MemoryError:
        message = (
            "parsing the JSON needs too much memory; send tensors as binary data, or split the "
            "request."
        )
        return [errors.PayloadTooLarge.__name__, message, None]
    return ["", "", vars(found)]


def _write(stream: IO[bytes], message: bytes) -> None:
    stream.write(LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    """Return the next message; None at the end of the stream."""
    length = stream.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(length)
    message = stream.read(size)
    return message if len(message) == size else None


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, default=_packed, unicode_errors="surrogatepass")
    return packed


def _packed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return msgpack.ExtType(OBJECTS, _pack([value.shape, value.ravel().tolist()]))
        return msgpack.ExtType(NUMBERS, _pack([value.dtype.str, value.shape, value.tobytes()]))
    raise TypeError(f"{type(value)} cannot be packed; expected an array")


def _unpack(message: bytes) -> Any:
    return msgpack.unpackb(
        message, ext_hook=_unpacked, strict_map_key=False, unicode_errors="surrogatepass"
    )


def _unpacked(kind: int, data: bytes) -> np.ndarray:
    if kind == OBJECTS:
        shape, values = _unpack(data)
        return tensors.object_array(values).reshape(shape)
    dtype, shape, content = _unpack(data)
    return np.frombuffer(content, np.dtype(dtype)).reshape(shape)


if __name__ == "__main__":
    main()
