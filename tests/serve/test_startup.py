"""Messages that `serve run` prints while the server starts and ends."""

import asyncio

import pytest

from serve import startup


@pytest.mark.parametrize("ending", [False, True])
def test_a_start_that_cannot_be_followed_is_reported_once(monkeypatch, capsys, ending):
    async def fails():
        raise RuntimeError("the controller died\nand more")

    async def follow():
        task = asyncio.create_task(fails())
        await asyncio.wait([task])
        startup._report(task)

    monkeypatch.setattr(startup, "_ending", asyncio.Event())
    if ending:
        startup._ending.set()
    asyncio.run(follow())
    said = capsys.readouterr().err
    line = "the start of the server cannot be monitored: the controller died\n"
    assert said == ("" if ending else line)
