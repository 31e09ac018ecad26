"""What is kept of a trial."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

State = Literal["running", "complete", "stopped", "failed"]


class StoredModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Exploit(StoredModel):
    """A trial went on from another's weights of an epoch, with options near the other's.

    values, rows: its own options and figures until then.
    """

    epoch: int
    donor: int
    donor_run: str
    values: dict[str, Any]
    rows: list[dict[str, float]]


class EpochReport(StoredModel):
    """An epoch's figures. at: their place among those of all trials. time: when they came."""

    at: int
    time: float
    figures: dict[str, float]


class Trial(StoredModel):
    """What is known of a trial."""

    number: int
    values: dict[str, Any]
    state: State = "running"
    began: float
    ended_at: float | None = None
    reports: list[EpochReport] = []
    served: dict[str, dict[str, Any]] = {}
    cause: str | None = None
    takeovers: list[Exploit] = []
    # What the sampler noted of it.
    notes: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    @property
    def run(self) -> str:
        """The folder of its run; after a takeover another."""
        return self.name + (f"-{len(self.takeovers)}" if self.takeovers else "")

    @property
    def rows(self) -> list[dict[str, float]]:
        return [report.figures for report in self.reports]

    @property
    def epoch(self) -> int:
        """The last that was reported."""
        return int(self.reports[-1].figures["epoch"]) if self.reports else 0

    @property
    def seconds(self) -> float:
        """Of training, without what it waited."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def ended(self) -> bool:
        return self.state != "running"
