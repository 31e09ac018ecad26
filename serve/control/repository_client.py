"""Clients of a model's deployments, which call them through Ray Serve's handles."""

from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from serve.access import Actor
from serve.errors import RequestError
from serve.rollout.aggregator import ReplicaReport
from serve.state import ServingState
from serve.telemetry.metrics import Snapshot


async def _call(handle: DeploymentHandle, method: str, *arguments: Any, **named: Any) -> Any:
    """Call a method of a deployment. Raises the RequestError that it raised."""
    try:
        return await getattr(handle, method).remote(*arguments, **named)
    except RayTaskError as error:
        # Ray adds a traceback to the message; the cause has the message for clients.
        raise error.cause if isinstance(error.cause, RequestError) else error from None


class RepositoryClient:
    """Client of a model's repository; see `serve.control.repository.Repository`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def state(self) -> ServingState:
        state: ServingState = await _call(self._handle, "state")
        return state

    async def follow(
        self, replica: str, known: tuple[str, int], problem: str | None, metrics: Snapshot
    ) -> ServingState | None:
        arguments = (replica, known, problem, metrics)
        state: ServingState | None = await _call(self._handle, "follow", *arguments)
        return state

    async def keep_alive(self, replica: str) -> None:
        await _call(self._handle, "keep_alive", replica)

    async def leave(self, replica: str) -> None:
        await _call(self._handle, "leave", replica)

    async def collect(self, report: ReplicaReport) -> None:
        await _call(self._handle, "collect", report)

    async def index(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = await _call(self._handle, "index")
        return models

    async def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = await _call(self._handle, "stats")
        return stats

    async def feedback(
        self,
        name: str,
        request_id: str,
        truths: Sequence[Any],
        actor: Actor,
        *,
        any_owner: str | None = None,
    ) -> dict[str, Any]:
        arguments = (name, request_id, truths, actor)
        counted: dict[str, Any] = await _call(
            self._handle, "feedback", *arguments, any_owner=any_owner
        )
        return counted

    async def load(
        self, name: str, actor: Actor, *, allow_interface_change: bool = False
    ) -> dict[str, Any]:
        loaded: dict[str, Any] = await _call(
            self._handle, "load", name, actor, allow_interface_change=allow_interface_change
        )
        return loaded

    async def unload(self, name: str, actor: Actor) -> None:
        await _call(self._handle, "unload", name, actor)

    async def metrics(self) -> Snapshot:
        metrics: Snapshot = await _call(self._handle, "metrics")
        return metrics


class ModelClient:
    """Client of a model's replicas; see `serve.deployment.ModelDeployment`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def forward(
        self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        arguments = (method, path, headers, body)
        response: tuple[int, list[tuple[bytes, bytes]], bytes] = await _call(
            self._handle, "forward", *arguments
        )
        return response
