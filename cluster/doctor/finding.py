"""The result of one check of the doctor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table. remedy: how to fix the problem; "" if there is none."""

    subject: str
    found: str
    remedy: str = ""
    required: bool = True

    @property
    def mark(self) -> str:
        """The state of the check: "ok", "missing" (a required part) or "optional" (any other)."""
        if not self.remedy:
            return "ok"
        return "missing" if self.required else "optional"
