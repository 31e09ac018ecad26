"""Malformed input for a server's ports: TLS records, HTTP/1.1, HTTP/2 frames and gRPC messages.

The seed and the number determine an input. A server may respond with 4xx, or close the stream or
the connection. A 5xx status, or UNKNOWN or INTERNAL in gRPC, counts as a fault.
"""

import asyncio
import json
import random
import ssl
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import hpack
import numpy as np
from hyperframe.frame import DataFrame, Frame, HeadersFrame, SettingsFrame

from serve.grpc.messages import types

CONNECT_S, ANSWER_S, CLIENTS = 20.0, 0.25, 48
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
IMAGE = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
INFER = "/v2/models/digits/infer"
SERVICE = "/inference.GRPCInferenceService/"
METHODS = ("ModelInfer", "ServerReady", "ModelMetadata", "RepositoryIndex", "RepositoryModelLoad")
# UNKNOWN and INTERNAL mean an unexpected error in the server. As an exception, gRPC specifies
# INTERNAL for a message that is marked as compressed in a call without grpc-encoding.
FAULTS = ("grpc=2 ", "grpc=13 ")
BY_RULE = "grpc=13 Compression bit set but no encoding configured"
TOKENS = (
    *(
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b"\0",
        b":",
        b" ",
        b"%00",
        b"../",
        b"{",
        b"[",
        b'"',
        b"\xff\xfe",
    ),
    *(b"Content-Length: 0\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Host: x\r\n", b"HTTP/9.9"),
    *(b"Inference-Header-Content-Length: 7\r\n", b"Content-Encoding: gzip\r\n", b"1e999", b"-1"),
    *(
        b"9" * 400,
        b"A" * 9000,
        b"[" * 3000,
        b"NaN",
        b"null",
        b"\xf0\x9f\x98\x80",
        b"Connection: close\r\n",
    ),
)


@dataclass
class Outcome:
    """Counts of responses by kind of input, and the faults as (number, kind, response)."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, number: int, kind: str, answers: Sequence[str]) -> None:
        """Count the responses to one input, as HTTP statuses or `grpc=CODE MESSAGE`."""
        for answer in answers or ["none"]:
            self.counts[f"{kind} {answer.partition(' ')[0]}"] += 1
            if answer[:1] == "5" or (answer.startswith(FAULTS) and answer != BY_RULE):
                self.faults.append((number, kind, answer))


def _body() -> bytes:
    tensor = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "UINT8"}
    return json.dumps({"inputs": [{**tensor, "data": IMAGE.reshape(-1).tolist()}]}).encode()


def _requests() -> list[tuple[str, str, list[tuple[str, str]], bytes]]:
    """Return the valid requests that inputs are made of: (method, path, headers, body)."""
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "image",
                    "shape": [1, 8, 8, 1],
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": 64},
                }
            ]
        }
    ).encode()
    form = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n\x89PNG'
        b"\r\n--b--\r\n"
    )
    return [
        ("GET", "/v2/health/ready", [], b""),
        ("GET", "/v2/models/digits", [("accept", "*/*")], b""),
        ("GET", "/metrics", [], b""),
        ("POST", INFER, [("content-type", "application/json")], _body()),
        (
            "POST",
            INFER,
            [("inference-header-content-length", str(len(header)))],
            header + IMAGE.tobytes(),
        ),
        (
            "POST",
            "/v1/models/digits:predict",
            [("content-type", "application/json")],
            json.dumps({"instances": IMAGE.tolist()}).encode(),
        ),
        ("POST", INFER, [("content-type", "multipart/form-data; boundary=b")], form),
        ("POST", INFER, [("content-encoding", "gzip")], b"\x1f\x8b\x08\0\0\0\0\0\0\x03"),
        ("POST", "/v2/repository/index", [], b"{}"),
        ("POST", "/v2/models/digits/feedback", [], b'{"id": "a", "label": 3}'),
    ]


REQUESTS = _requests()


def mutated(source: random.Random, data: bytes) -> bytes:
    """Return the bytes with zero to six random changes."""
    broken = bytearray(data)
    for _ in range(source.choice((0, 1, 1, 1, 2, 3, 6))):
        at = source.randrange(len(broken) + 1)
        upto = min(len(broken), at + source.choice((1, 2, 4, 16, 64)))
        match source.randrange(6):
            case 0 if at < len(broken):
                broken[at] ^= 1 << source.randrange(8)
            case 1:
                del broken[at:upto]
            case 2:
                broken[at:at] = source.choice(TOKENS)
            case 3:
                broken[at:at] = broken[at:upto] * source.choice((1, 2, 50))
            case 4:
                broken[at:upto] = source.randbytes(upto - at)
            case _:
                del broken[at:]
    return bytes(broken)


def http1(source: random.Random) -> bytes:
    method, path, headers, body = source.choice(REQUESTS)
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    whole = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    # In half of the cases only the body is changed, so that the server reads it.
    if body and source.random() < 0.5:
        broken = mutated(source, body)
        start = whole[: -len(body)].replace(
            f"content-length: {len(body)}".encode(), f"content-length: {len(broken)}".encode()
        )
        return start + broken
    return mutated(source, whole)


def http2(source: random.Random) -> bytes:
    method, path, headers, body = source.choice(REQUESTS)
    fields = [(":method", method), (":scheme", "https"), (":authority", "localhost")]
    return _frames(source, [*fields, (":path", path), *headers], body)


def grpc(source: random.Random) -> bytes:
    fields = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost")]
    fields += [(":path", SERVICE + source.choice(METHODS)), ("te", "trailers")]
    fields += [("content-type", "application/grpc"), ("application", "default")]
    message = types.ModelInferRequest(model_name="digits", id="f")
    message.inputs.add(name="image", datatype="UINT8", shape=IMAGE.shape)
    message.raw_input_contents.append(IMAGE.tobytes())
    content = message.SerializeToString()
    if source.random() < 0.7:
        content = mutated(source, content)
    length = source.choice((len(content),) * 6 + (0, len(content) + 1, 2**31, 2**32 - 1))
    compressed = source.choice((0,) * 8 + (1, 7))
    return _frames(source, fields, struct.pack(">BI", compressed, length) + content)


def _frames(source: random.Random, fields: list[tuple[str, str]], body: bytes) -> bytes:
    """Return an HTTP/2 request, in most cases with malformed fields, frames or bytes."""
    if source.random() < 0.3:
        at = source.randrange(len(fields))
        name, value = fields[at]
        other = source.choice(("", "\0", "a" * 5000, value + "\r\nx: y", "\x7f", value.upper()))
        changed = source.choice(([], [(name, other)], [(other, value)], [fields[at]] * 2))
        fields = [*fields[:at], *changed, *fields[at + 1 :]]
    frames: list[Frame] = [SettingsFrame(0)]
    head = HeadersFrame(1, hpack.Encoder().encode(fields))
    head.flags.add("END_HEADERS")
    frames.append(head)
    if body:
        cut = source.randrange(len(body) + 1)
        frames += [DataFrame(1, body[:cut]), DataFrame(1, body[cut:])]
    frames[-1].flags.add("END_STREAM")
    parts = [frame.serialize() for frame in frames]
    if source.random() < 0.5:
        at = source.randrange(len(parts))
        parts[at : at + 1] = source.choice(
            (
                [],
                [parts[at]] * 2,
                [mutated(source, parts[at])],
                [parts[at], _any_frame(source)],
                [_any_frame(source) for _ in range(20)],
            )
        )
    whole = PREFACE + b"".join(parts)
    return mutated(source, whole) if source.random() < 0.3 else whole


def _any_frame(source: random.Random) -> bytes:
    """Return a frame with random type, flags and stream, and possibly a wrong length."""
    content = source.randbytes(source.choice((0, 1, 4, 5, 6, 8, 40, 20_000)))
    length = source.choice((len(content),) * 4 + (0, 2**24 - 1))
    kind, flags = source.randrange(12), source.randrange(256)
    stream = source.choice((0, 1, 2, 3, 2**31 - 1))
    return struct.pack(">I", length)[1:] + struct.pack(">BBI", kind, flags, stream) + content


def tls(source: random.Random) -> bytes:
    """Return a malformed TLS ClientHello, or random bytes."""
    return mutated(source, HELLO) if source.random() < 0.8 else source.randbytes(300)


def _hello() -> bytes:
    """Return a TLS ClientHello; only its random fields differ between runs."""
    outgoing = ssl.MemoryBIO()
    made = ssl.create_default_context().wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname="localhost"
    )
    with suppress(ssl.SSLWantReadError):
        made.do_handshake()
    return outgoing.read()


HELLO = _hello()


def read_http1(data: bytes) -> list[str]:
    parts = data.split(b"HTTP/1.1 ")
    return [part[:3].decode("latin-1") for part in parts[1:] if part[:3] != b"100"]


def read_http2(data: bytes) -> list[str]:
    """Return the statuses in a response: of gRPC for gRPC calls, else of HTTP."""
    found, decoder = [], hpack.Decoder()
    view = memoryview(data)
    while len(view) >= 9:
        frame, length = Frame.parse_frame_header(view[:9])
        with suppress(Exception):  # a truncated frame holds no status
            if isinstance(frame, HeadersFrame):
                frame.parse_body(view[9 : 9 + length])
                fields = dict(decoder.decode(frame.data))
                if code := fields.get("grpc-status"):
                    found.append(f"grpc={code} {fields.get('grpc-message', '')}")
                elif (status := fields.get(":status")) and "grpc" not in fields.get(
                    "content-type", ""
                ):
                    found.append(status)
        view = view[9 + length :]
    return found


# Kind → (share of the inputs, generator, ALPN protocol of the client, reader of responses).
KINDS: dict[
    str, tuple[float, Callable[[random.Random], bytes], str | None, Callable[[bytes], list[str]]]
] = {
    "tls": (0.1, tls, None, lambda data: []),
    "http/1.1": (0.4, http1, "http/1.1", read_http1),
    "http/2": (0.3, http2, "h2", read_http2),
    "grpc": (0.2, grpc, "h2", read_http2),
}


def make_input(seed: int, number: int) -> tuple[str, bytes]:
    """Return (kind, bytes) of an input."""
    source = random.Random(f"{seed}/{number}")
    (kind,) = source.choices(list(KINDS), [each[0] for each in KINDS.values()])
    return kind, KINDS[kind][1](source)


async def attack(
    numbers: Sequence[int],
    seed: int,
    ports: tuple[int, int],
    make_context: Callable[[str], ssl.SSLContext],
) -> Outcome:
    """Send inputs to a server on this machine, each on its own connection.

    ports: (HTTP, gRPC). make_context: ALPN protocol → TLS context of the client.
    """
    outcome, waiting = Outcome(), iter(numbers)
    contexts = {kind: make_context(each[2]) for kind, each in KINDS.items() if each[2]}

    async def client() -> None:
        for number in waiting:
            kind, data = make_input(seed, number)
            port = ports[1] if kind == "grpc" else ports[0]
            answer = await _ask(port, contexts.get(kind), data)
            outcome.add(number, kind, KINDS[kind][3](answer))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return outcome


async def _ask(port: int, context: ssl.SSLContext | None, data: bytes) -> bytes:
    """Return the response up to its end, or up to ANSWER_S seconds without data."""
    options = {"ssl": context, "server_hostname": "localhost"} if context else {}
    async with asyncio.timeout(CONNECT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    answer = b""
    try:
        writer.write(data)
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout(ANSWER_S):
                    if not (more := await reader.read(65536)):
                        break
                answer += more
    except (ConnectionError, ssl.SSLError):
        pass
    finally:
        writer.transport.abort()
    return answer
