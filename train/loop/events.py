"""Events: what a run tells of itself while it goes on, from rank 0 to the driver."""

import threading
from collections.abc import Callable
from typing import Any

import ray

Event = dict[str, Any]
POLL_S = 0.3


class _Mailbox:
    """Keeps events until the driver takes them. Runs as an actor beside the workers."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken


class Events:
    """The sending end, which may be sent to workers."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def send(self, event: Event) -> None:
        self._mailbox.put.remote(event)


class Follower:
    """Calls `show` with each event, in a thread, while its block runs."""

    def __init__(self, show: Callable[[Event], None]) -> None:
        self._show = show
        self._mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="events", daemon=True)
        self.events = Events(self._mailbox)

    def __enter__(self) -> "Follower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        ray.kill(self._mailbox)

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(POLL_S)
            for event in ray.get(self._mailbox.take.remote()):
                self._show(event)
