"""Ports of sandboxes and their previews: what is asked for and what is answered."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, Field, StrictInt

from atelier.model.preview import Visibility
from atelier.schemas.request_body import RequestBody

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


class SetVisibilityRequest(RequestBody):
    """`private`: who may use the sandbox; `link`: they, and who has a link; `public`: everybody."""

    visibility: Visibility


class PreviewLinkRequest(RequestBody):
    expires_in_seconds: Annotated[StrictInt, Field(ge=1, le=365 * 86400)] = DEFAULT_LINK_SECONDS


class PreviewLink(BaseModel):
    url: str
    expires_at: datetime


class PreviewVisitRequest(RequestBody):
    """``path``: where it leads in the preview, with the query."""

    path: Annotated[str, Field(max_length=2000)] = "/"


class PreviewVisit(BaseModel):
    url: str
