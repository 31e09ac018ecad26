"""What retraining did to a model, and when."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from cluster import commit, storage

HISTORY = 20


class RetrainHistory:
    """What retraining did to a model, in a file under the storage path: the last HISTORY times."""

    def __init__(self, root: str, model: str) -> None:
        self._place = storage.join_path(root, "retrain", model)
        self._url = self.url("json")

    def url(self, ending: str) -> str:
        """Where a file of this model's retraining is."""
        return f"{self._place}.{ending}"

    def history(self) -> list[dict[str, Any]]:
        content = storage.read_file(self._url)
        if content is None:
            return []
        found: list[dict[str, Any]] = json.loads(content)["history"]
        return found

    def note(self, entry: Mapping[str, Any]) -> None:
        """Write down one time, by its `began`, again when more of it is known."""
        others = [each for each in self.history() if each["began"] != entry["began"]]
        history = [*others, dict(entry)][-HISTORY:]
        with storage.storage_errors(self._url):
            commit.write_atomic(self._url, json.dumps({"history": history}, indent=1).encode())

    def cooling(self, hours: float) -> str | None:
        """Say how long ago the last training began, if that is too short a time."""
        history = self.history()
        if not history:
            return None
        ago = datetime.now(UTC) - datetime.fromisoformat(history[-1]["began"])
        if ago >= timedelta(hours=hours):
            return None
        return f"the last training began {ago.total_seconds() / 3600:.1f} h ago, of {hours:g}"
