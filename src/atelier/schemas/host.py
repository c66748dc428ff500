"""The host: what belongs to nobody, and the manager's end."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from atelier.model.orphan import OrphanKind
from atelier.schemas.request_body import RequestBody


class Orphan(BaseModel):
    """What belongs to nobody: a ``volume`` or ``memory`` without a sandbox, or a ``snapshot`` that no row tells of. ``id``:
    of what it was. It is kept until somebody removes it."""

    kind: OrphanKind
    id: str
    used_bytes: int


class OrphanList(BaseModel):
    items: list[Orphan]


class ShutdownRequest(RequestBody):
    """``sandboxes``: whether they go on (``keep``), are stopped, or are destroyed."""

    sandboxes: Literal["keep", "stop", "destroy"] = "stop"


class ShutdownAnswer(BaseModel):
    """``changed``: names of the sandboxes that were stopped or destroyed; ``running``: of those that go on."""

    changed: list[str]
    running: list[str]
