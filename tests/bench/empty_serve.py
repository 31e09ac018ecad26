"""An empty handler on Ray Serve with default settings: the throughput of its ingress alone."""

from ray import serve


@serve.deployment(max_ongoing_requests=100)
class Empty:
    async def __call__(self, request: object) -> bytes:
        return b""


app = Empty.bind()
