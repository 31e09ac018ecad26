"""Events: what a run tells of itself while it goes on, from its workers to the driver.

They pass through the key-value store that every Ray cluster has, which costs no process.
"""

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.ray_internals import KeyValueStore
from train.telemetry.throughput import Event

POLL_S = 1.0
STORE = KeyValueStore(b"halyard-events")


@dataclass(frozen=True)
class EventSender:
    """The sending end, which may be sent to workers."""

    run: str

    def send(self, event: Event) -> None:
        # Ordered by time; no two are alike.
        key = f"{self.run}/{time.time_ns():020d}-{secrets.token_hex(4)}"
        STORE.put(key, json.dumps(event).encode())


def until_failure(observe: Callable[[Event], None]) -> Callable[[Event], None]:
    """Call `observe` until it raises; say so in one line. The run does not depend on it."""
    failed = False

    def call(event: Event) -> None:
        nonlocal failed
        if failed:
            return
        try:
            observe(event)
        except Exception as error:
            failed = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"figures are no longer recorded: {reason}", file=sys.stderr)

    return call


class EventListener:
    """Calls `show` with each event, in a thread, while its block runs."""

    def __init__(self, show: Callable[[Event], None]) -> None:
        self._show = show
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="events", daemon=True)
        self.events = EventSender(secrets.token_hex(8))

    def __enter__(self) -> "EventListener":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _follow(self) -> None:
        prefix = f"{self.events.run}/"
        ended = False
        while not ended:
            ended = self._end.wait(POLL_S)
            for value in STORE.pop(prefix):
                self._show(json.loads(value))
