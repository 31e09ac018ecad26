"""Serving: a bundle behind HTTP, on Ray Serve.

`serve run serve.app [model=models:/NAME@ALIAS] [key=value …]`
"""

from typing import Any

from cluster.serve_environment import set_serve_environment

# Before Ray Serve starts: the processes of a cluster that it starts inherit the environment.
set_serve_environment()


def __getattr__(name: str) -> Any:
    # `serve run serve.app` imports this package and takes its attribute `app`. Looked up only
    # then, so that other commands of this package do without Ray Serve's imports.
    if name == "app":
        from serve.deployment import app

        return app
    raise AttributeError(f"module 'serve' has no attribute '{name}'")
