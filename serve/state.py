"""The state that a model's replicas serve, as the repository publishes it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rollout:
    """A candidate that gets a fraction of the requests. phase: "shadow" or "canary"."""

    candidate: str
    phase: str
    fraction: float


@dataclass(frozen=True)
class ServingState:
    """The versions to serve. revision: number of changes so far.

    default: the version for requests that name none. rollout: None without a candidate.
    locations: version → location of its bundle. aliases: alias → version.
    """

    revision: int
    name: str
    default: str
    locations: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)
    loaded: bool = True
    rollout: Rollout | None = None
