"""The garbage collector, kept from looking where there is nothing to collect."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_gc() -> Iterator[None]:
    """Collect no cycles meanwhile.

    Else many new objects that are all in use are looked through again and again, while all threads
    wait: a JSON of many lists takes several times as long.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
