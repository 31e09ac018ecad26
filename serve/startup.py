"""Report that the server of `serve run` is ready, and shut it down cleanly."""

import asyncio
import signal
import ssl
import sys
import threading
import time
import urllib.request
from concurrent.futures import Future
from functools import cache

from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from cluster import ray_internals
from serve.config import ServeConfig

POLL_S = 0.2
# Seconds after which the cause of a slow start is printed.
PATIENCE_S = 20.0
# Set once the server shuts down: calls to it then fail, which is not reported.
_ending = threading.Event()


def end_on_signals() -> None:
    """Make SIGTERM shut down `serve run` as Ctrl-C does: requests finish and logs are written.

    Ray's own handler of SIGTERM aborts the process. On a signal the handler raises
    KeyboardInterrupt in the main thread, from which this must be called; a second signal kills the
    process.
    """

    def end(number: int, frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        _ending.set()
        # From here on, worker processes print only that they exit.
        ray_internals.silence_workers()
        print("stopping once requests in progress are finished", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)


def announce_server(config: ServeConfig, model: str, version: str) -> None:
    """Print to stderr, once the server is ready, what it serves and where. Returns at once.

    model: name of the deployment. version: the default one.
    """

    announcing = asyncio.run_coroutine_threadsafe(_announce(config, model, version), _loop())
    announcing.add_done_callback(_report)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all announcements of this process.

    There is one loop, because the handles of a deployment are bound to the loop of their first use.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _report(announcing: Future[None]) -> None:
    """Print in one line why the server's start could not be monitored, unless it shuts down."""
    if (error := announcing.exception()) and not _ending.is_set():
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"the start of the server cannot be monitored: {reason}", file=sys.stderr)


async def _announce(config: ServeConfig, model: str, version: str) -> None:
    address = config.local_url
    application = await _running(model)
    if config.replica_range[0]:
        while not await asyncio.to_thread(_answers, address):
            await asyncio.sleep(POLL_S)
        handle = serve.get_deployment_handle(model, application)
        served = await handle.describe.remote()
        words = f"version {served['version']}, variant {served['variant']}"
    else:
        words = f"version {version}, which starts with the first request"
    print(
        f"serving {model} {words}, at {address}; API {address}/docs, console {address}/",
        file=sys.stderr,
        flush=True,
    )


async def _running(model: str) -> str:
    """Return the name of the model's application once it runs."""
    began, told = time.monotonic(), False
    while True:
        found = await asyncio.to_thread(serve.status)
        for name, application in found.applications.items():
            if model not in application.deployments:
                continue
            if application.status == ApplicationStatus.RUNNING:
                return name
            if not told and time.monotonic() - began > PATIENCE_S:
                told = True
                print(f"waiting for {model}: {_reason(application, model)}", file=sys.stderr)
        await asyncio.sleep(POLL_S)


def _reason(application: ApplicationStatusOverview, model: str) -> str:
    """Return Serve's message on why the application does not run yet."""
    words = application.deployments[model].message or application.message
    return " ".join(words.split())[:300] or "it is starting"


def _answers(address: str) -> bool:
    # The certificate is for the host names that clients use, so it is not verified here.
    tls = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    # Ignore HTTP proxies in the environment.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), tls)
    try:
        with direct.open(f"{address}/v2/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError as error:
        # HAProxy is ready, but requires a client certificate, which this process does not have.
        return "CERTIFICATE_REQUIRED" in str(error)
