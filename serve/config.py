"""Every knob of a server."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import UserError


class ServeConfig(BaseModel):
    """What `serve run serve.app key=value …` accepts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "models:/digits@production",
        min_length=1,
        description="models:/NAME@ALIAS, models:/NAME/VERSION, or the location of a bundle.",
    )
    variant: str | None = Field(
        None, description="Variant to serve; the bundle's default when not given."
    )
    storage: str = Field("runs", description="Storage path whose registry has the model.")
    replicas: int = Field(1, ge=1, le=1000, description="Copies of the model.")
    threads: int = Field(1, ge=1, le=256, description="Threads of each replica's engine.")
    max_batch_rows: int = Field(
        64, ge=1, le=4096, description="Most rows that the engine is given at once."
    )
    max_queue_rows: int = Field(
        1024, ge=1, le=1_000_000, description="Waiting rows per replica before 503 is answered."
    )
    max_rows: int = Field(
        1024, ge=1, le=1_000_000, description="Most rows in one request; more is answered by 413."
    )
    timeout_s: float = Field(
        30, gt=0, le=3600, description="Longest that a request waits for its answer."
    )
    max_body_bytes: int = Field(
        64 * 2**20, ge=1, le=2**31, description="Largest request body; more is answered by 413."
    )


def validate(values: Mapping[str, Any]) -> ServeConfig:
    """Raises UserError for the first key that is unknown or wrong."""
    try:
        return ServeConfig.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(ServeConfig.model_fields)
            raise UserError(f"unknown option '{key}'; accepted are {known}.") from error
        raise UserError(f"option {key}={first['input']}: {first['msg'].lower()}.") from error
