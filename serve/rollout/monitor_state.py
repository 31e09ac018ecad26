"""The state of monitoring, which the repository writes and `serve.retrain` reads."""

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import commit, storage
from cluster.errors import UserError
from serve.drift.windows import DriftWindow


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LiveFeedback(_Part):
    """A metric of recent feedback with its 95 % interval, and its value on the test split.

    count: labelled rows. expected: None if the test split has no such metric.
    """

    count: int
    metric: str
    value: float
    low: float
    high: float
    expected: float | None


class VersionState(_Part):
    """Monitoring of one version.

    windows: the latest drift windows, oldest first. feedback: None before there is any.
    """

    windows: tuple[DriftWindow, ...]
    feedback: LiveFeedback | None


class MonitorState(_Part):
    """Monitoring of all served versions of a model.

    time: UTC, ISO 8601. production: the version in production.
    """

    time: str
    production: str
    versions: dict[str, VersionState]

    @classmethod
    def read(cls, root: str, model: str) -> "MonitorState | None":
        """Return the state of a model from a storage path; None if none was written yet.

        Raises UserError if the file is damaged.
        """
        url = _url(root, model)
        content = storage.read_file(url)
        if content is None:
            return None
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(
                f"'{url}' is not the state of a monitor ({reason}); delete it, so that the server "
                "writes a new one."
            ) from error

    def write(self, root: str, model: str) -> None:
        """Write the state, complete or not at all. Raises OSError."""
        commit.write_atomic(_url(root, model), self.model_dump_json(indent=1).encode())


def _url(root: str, model: str) -> str:
    return storage.join_path(root, "monitor", f"{model}.json")
