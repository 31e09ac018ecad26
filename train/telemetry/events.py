"""Events that the workers of a run send to the driver during training.

They are sent through the key-value store of the Ray cluster, which needs no additional process.
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
    """Sends events of a run; can be pickled and sent to workers."""

    run: str

    def send(self, event: Event) -> None:
        """Send an event, a dict of JSON values whose key "event" names its kind."""
        # Keys are ordered by time and unique.
        key = f"{self.run}/{time.time_ns():020d}-{secrets.token_hex(4)}"
        STORE.put(key, json.dumps(event).encode())


def until_failure(observe: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return a function that calls `observe` until it raises; that is reported in one line.

    Training continues, because it does not depend on the observer.
    """
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
            print(f"metrics are no longer recorded: {reason}", file=sys.stderr)

    return call


class EventListener:
    """Calls `show` with each event from another thread, while its block runs."""

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
