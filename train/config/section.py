"""Base class and shared types of the option sections."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from train.values.records import plain_name

ColumnName = Annotated[str, AfterValidator(plain_name)]
Count = Annotated[int, Field(ge=1, le=4096)]


class Section(BaseModel):
    """Base of all option sections. Unknown options are errors; instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)
