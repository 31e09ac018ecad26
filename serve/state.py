"""The serving state: the versions that the repository tells a model's replicas to serve."""

import secrets
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rollout:
    """A candidate that gets a fraction (0..1) of the requests. phase: "shadow" or "canary"."""

    candidate: str
    phase: str
    fraction: float


@dataclass(frozen=True)
class ServingState:
    """The versions to serve.

    revision: number of changes since the deployment. default: version used when the request names
    none. locations: version → location of its bundle. aliases: alias → version. loaded: false while
    the model is unloaded. rollout: None without a candidate. incarnation: id of the deployment;
    states of different deployments are unrelated.
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
        """An id that distinguishes the state from every other state."""
        return self.incarnation, self.revision
