"""Ports of sandboxes and their previews: what is asked for and what is answered."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from atelier.model.preview import Visibility

DEFAULT_LINK_SECONDS = 7 * 86400


class Port(BaseModel):
    """``is_open``: something listens there; null: nobody has looked. ``tool``: the name that stands for the port in
    addresses. ``url``: null where previews are not served."""

    port: int
    tool: str | None
    is_open: bool | None
    visibility: Visibility
    url: str | None


class PortList(BaseModel):
    items: list[Port]


class SetVisibilityRequest(BaseModel):
    """`private`: who may use the sandbox; `link`: they, and who has a link; `public`: everybody."""

    model_config = ConfigDict(extra="forbid")

    visibility: Visibility


class PreviewLinkRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    expires_in_seconds: Annotated[int, Field(ge=1, le=365 * 86400)] = DEFAULT_LINK_SECONDS


class PreviewLink(BaseModel):
    url: str
    expires_at: datetime


class PreviewVisitRequest(BaseModel):
    """``path``: where it leads in the preview, with the query."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[str, Field(max_length=2000)] = "/"


class PreviewVisit(BaseModel):
    url: str
