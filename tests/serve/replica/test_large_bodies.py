"""Large bodies are decoded outside the event loop, one at a time and within a memory limit."""

import asyncio
import threading

import pytest

from serve.errors import Overloaded
from serve.http import content
from serve.http.request import Request
from serve.replica.large_bodies import INLINE_BYTES, LargeBodyDecoder

LARGE = INLINE_BYTES + 1


@pytest.mark.parametrize(("size", "elsewhere"), [(INLINE_BYTES, False), (LARGE, True)])
def test_large_bodies_are_decoded_in_another_thread(size, elsewhere):
    async def ask():
        return await LargeBodyDecoder(2**30).decode(threading.get_ident, size, size)

    assert (asyncio.run(ask()) != threading.get_ident()) is elsewhere


def test_the_event_loop_runs_while_a_body_is_decoded():
    answered = threading.Event()

    async def ask():
        decoder = LargeBodyDecoder(2**30)
        large = asyncio.create_task(decoder.decode(lambda: answered.wait(30), LARGE, LARGE))
        await asyncio.sleep(0)
        assert await decoder.decode(lambda: "small", 1, 1) == "small"
        answered.set()
        return await large

    assert asyncio.run(ask())


def test_one_body_is_decoded_at_a_time():
    first_is_done = threading.Event()
    order = []

    def first():
        assert not order
        first_is_done.set()
        order.append("first")

    def second():
        assert first_is_done.is_set()
        order.append("second")

    async def ask():
        decoder = LargeBodyDecoder(2**30)
        await asyncio.gather(*[decoder.decode(each, LARGE, LARGE) for each in (first, second)])
        assert not decoder._turn.locked()

    asyncio.run(ask())
    assert order == ["first", "second"]


def test_the_size_of_waiting_bodies_is_bounded():
    answered = threading.Event()

    async def ask():
        decoder = LargeBodyDecoder(2 * LARGE)
        waiting = [
            asyncio.create_task(decoder.decode(lambda: answered.wait(30), LARGE, LARGE))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="too many large requests are waiting"):
            await decoder.decode(bytes, LARGE, LARGE)
        answered.set()
        await asyncio.gather(*waiting)
        assert await decoder.decode(bytes, LARGE, LARGE) == b""

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("headers", "parsed"),
    [
        ({}, 1000),
        ({"content-type": "image/png"}, 0),
        ({"inference-header-content-length": "40"}, 40),
        ({"inference-header-content-length": "4000"}, 1000),
        ({"inference-header-content-length": "-1"}, 1000),
        ({"content-encoding": "gzip"}, 1_032_000),
        ({"content-encoding": "gzip", "content-type": "image/png"}, 1_032_000),
    ],
)
def test_the_parsed_bytes_of_a_body_are_estimated(headers, parsed):
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    request = Request({"headers": pairs, "method": "POST", "path": "/"}, None)
    assert content.parsed_bytes(request, bytes(1000)) == parsed
