"""Images and their builds."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field, StrictBool

from atelier.schemas.processes import FailedEvent
from atelier.schemas.request_body import RequestBody


class Image(BaseModel):
    id: str
    name: str
    size_mib: int
    stored_bytes: int
    built_at: datetime


class ImageList(BaseModel):
    """``recipes``: names that can be built, built or not."""

    items: list[Image]
    recipes: list[str]


class BuildImageRequest(RequestBody):
    """``refresh`` builds again although the recipe is unchanged, to take in newer packages."""

    refresh: StrictBool = False


class BuildProgressEvent(BaseModel):
    type: Literal["progress"] = "progress"
    phase: str
    message: str
    fraction: float | None = None


class BuildDoneEvent(BaseModel):
    type: Literal["built"] = "built"
    image: Image


BuildEvent = Annotated[BuildProgressEvent | BuildDoneEvent | FailedEvent, Field(discriminator="type")]
"""One line of an ``application/x-ndjson`` answer."""
