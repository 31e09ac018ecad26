"""Options of image augmentation."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from train.config.section import Section


class Stage(Section):
    """A part of the run that trains on smaller images."""

    until: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of all steps after which this stage ends; 1 for the last stage.",
    )
    scale: float = Field(
        1.0, ge=0.05, le=1, description="Resize images to this fraction of their height and width."
    )
    crop: float = Field(
        1.0,
        ge=0.05,
        le=1,
        description="Crop images to this fraction of their height and width, at a random place.",
    )

    @property
    def side(self) -> float:
        """Fraction of the images' height and width that the network receives."""
        return self.scale * self.crop


def _last_to_the_end(stages: Sequence[Stage]) -> Sequence[Stage]:
    ends = [stage.until for stage in stages]
    if ends != sorted(set(ends)) or ends[-1] != 1:
        raise ValueError("the values of until must increase, and the last must be 1")
    return stages


class Augment(Section):
    """Options of image augmentation. They are refused if the records have no images."""

    stages: Annotated[tuple[Stage, ...], AfterValidator(_last_to_the_end)] = Field(
        (Stage(),),
        min_length=1,
        description="Stages that train on smaller images to save time, such as "
        "[{until: 0.3, scale: 0.5}, {until: 1}]. By default the whole run uses images of full "
        "size, as evaluation always does.",
    )
    flip: bool = Field(
        False,
        description="Mirror each image left to right in every second epoch. Not for images such "
        "as letters, whose mirror image has another meaning.",
    )
    translate: int = Field(
        0,
        ge=0,
        le=64,
        description="Shift images at random by up to this many pixels in each direction; the "
        "borders are filled by reflection.",
    )
    crop_area: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Zoom into a random crop of at least this fraction of the image's area, such "
        "as 0.5. By default images are not cropped.",
    )
    cutout: int = Field(
        0,
        ge=0,
        le=256,
        description="Side in pixels of a square that is greyed out at a random place; 0 is off.",
    )
    mixup: float = Field(
        0,
        ge=0,
        le=10,
        description="Blend images in pairs; the value is the alpha of the Beta distribution of the "
        "blending weight, 0 is off. For records that are one image each.",
    )
    cutmix: float = Field(
        0,
        ge=0,
        le=10,
        description="Paste a box of one image into another; the value is the alpha of the Beta "
        "distribution of the area, 0 is off. For records that are one image each. With mixup set "
        "too, each batch uses one of the two at random.",
    )
