"""The state that a model's replicas serve, as the repository publishes it."""

import secrets
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rollout:
    """A candidate that gets a fraction of the requests. phase: "shadow" or "canary"."""

    candidate: str
    phase: str
    fraction: float


@dataclass(frozen=True)
class ServingState:
    """The versions to serve. revision: number of changes since the deployment.

    default: the version for requests that name none. rollout: None without a candidate.
    locations: version → location of its bundle. aliases: alias → version.
    incarnation: the deployment; states of two deployments have nothing to do with each other.
    """

    revision: int
    name: str
    default: str
    locations: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)
    loaded: bool = True
    rollout: Rollout | None = None
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8), compare=False)

    @property
    def id(self) -> tuple[str, int]:
        """What distinguishes it from every other state."""
        return self.incarnation, self.revision
