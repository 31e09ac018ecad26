"""A line of the doctor's table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the table. remedy: what to do; empty when all is well."""

    subject: str
    found: str
    remedy: str = ""
    required: bool = True

    @property
    def mark(self) -> str:
        if not self.remedy:
            return "ok"
        return "missing" if self.required else "optional"
