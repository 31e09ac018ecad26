"""The stored record of a trial."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

State = Literal["running", "complete", "stopped", "failed"]


class StoredModel(BaseModel):
    """Base of the records in a trial's file; unknown fields are an error."""

    model_config = ConfigDict(extra="forbid")


class Exploit(StoredModel):
    """A takeover: a trial continued from a donor's weights of an epoch, with similar options.

    values, rows: the trial's own options and figures until then.
    """

    epoch: int
    donor: int
    donor_run: str
    values: dict[str, Any]
    rows: list[dict[str, float]]


class EpochReport(StoredModel):
    """An epoch's figures. at: index among the reports of all trials. time: seconds since 1970."""

    at: int
    time: float
    figures: dict[str, float]


class Trial(StoredModel):
    """A trial: its options, state and results."""

    number: int
    values: dict[str, Any]
    state: State = "running"
    began: float
    ended_at: float | None = None
    reports: list[EpochReport] = []
    served: dict[str, dict[str, Any]] = {}
    cause: str | None = None
    takeovers: list[Exploit] = []
    # Attributes that the sampler stored with the trial.
    notes: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    @property
    def run(self) -> str:
        """The folder of the trial's run, which changes with each takeover."""
        return self.name + (f"-{len(self.takeovers)}" if self.takeovers else "")

    @property
    def rows(self) -> list[dict[str, float]]:
        return [report.figures for report in self.reports]

    @property
    def epoch(self) -> int:
        """The last reported epoch, 0 before the first one."""
        return int(self.reports[-1].figures["epoch"]) if self.reports else 0

    @property
    def seconds(self) -> float:
        """The seconds of training, without the time that the trial waited."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def ended(self) -> bool:
        return self.state != "running"
