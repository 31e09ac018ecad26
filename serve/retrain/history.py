"""The history of a model's retraining."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from cluster import commit, storage

# Entries that are kept.
HISTORY = 20


class RetrainHistory:
    """The last HISTORY trainings of a model, in a file below the storage path."""

    def __init__(self, root: str, model: str) -> None:
        self._place = storage.join_path(root, "retrain", model)
        self._url = self.url("json")

    def url(self, ending: str) -> str:
        """Return the path or URL of a file of this model's retraining, by its ending."""
        return f"{self._place}.{ending}"

    def history(self) -> list[dict[str, Any]]:
        """Return the entries, oldest first."""
        content = storage.read_file(self._url)
        if content is None:
            return []
        found: list[dict[str, Any]] = json.loads(content)["history"]
        return found

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add an entry, or replace the entry with the same `began`."""
        others = [each for each in self.history() if each["began"] != entry["began"]]
        history = [*others, dict(entry)][-HISTORY:]
        with storage.storage_errors(self._url):
            commit.write_atomic(self._url, json.dumps({"history": history}, indent=1).encode())

    def cooling(self, hours: float) -> str | None:
        """Return how long ago the last training began if that is less than `hours`, else None."""
        history = self.history()
        if not history:
            return None
        ago = datetime.now(UTC) - datetime.fromisoformat(history[-1]["began"])
        if ago >= timedelta(hours=hours):
            return None
        past_hours = ago.total_seconds() / 3600
        return f"the last training began {past_hours:.1f} h ago; --cooldown-hours is {hours:g}"
