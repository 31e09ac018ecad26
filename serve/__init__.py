"""Serving of bundles over HTTP and gRPC, on Ray Serve.

`serve run serve.app [model=models:/NAME@ALIAS] [key=value …]` starts a server. From Python,
`deploy` does the same in a child process, and `Client` sends requests.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.client.client import Client, RequestFailed
    from serve.client.local_server import Server, deploy

__all__ = ["Client", "RequestFailed", "Server", "app", "deploy"]


def __getattr__(name: str) -> Any:
    # Lazy, because clients need neither Ray nor its environment.
    if name == "app":
        from cluster.serve_environment import set_serve_environment

        # Before Ray Serve starts: the processes of a cluster that it starts inherit the
        # environment.
        set_serve_environment()
        from serve.deployment import app

        return app
    if name in ("Client", "RequestFailed"):
        from serve.client import client

        return getattr(client, name)
    if name in ("Server", "deploy"):
        from serve.client import local_server

        return getattr(local_server, name)
    raise AttributeError(f"module 'serve' has no attribute '{name}'")
