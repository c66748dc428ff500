"""What ``/health`` answers, to anybody."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Health(BaseModel):
    status: str
    version: str
    mode: str
    network: str = Field(
        default="", description="What connects sandboxes: `bridge` (the internet), `closed` (nothing), `fake`."
    )
    network_missing: str = Field(
        default="", description="Why sandboxes have no way out where nobody has asked for that, with the remedy."
    )
