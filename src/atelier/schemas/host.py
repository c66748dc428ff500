"""The host: volumes without a sandbox, and the manager's end."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class OrphanVolume(BaseModel):
    """A disk that belongs to no sandbox. It is kept until somebody removes it."""

    sandbox_id: str
    used_bytes: int


class OrphanVolumeList(BaseModel):
    items: list[OrphanVolume]


class ShutdownRequest(BaseModel):
    """``sandboxes``: whether they go on (``keep``), are stopped, or are destroyed."""

    model_config = ConfigDict(extra="forbid")

    sandboxes: Literal["keep", "stop", "destroy"] = "stop"


class ShutdownAnswer(BaseModel):
    """``changed``: names of the sandboxes that were stopped or destroyed; ``running``: of those that go on."""

    changed: list[str]
    running: list[str]
