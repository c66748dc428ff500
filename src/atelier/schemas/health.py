"""What ``/health`` answers, to anybody."""

from __future__ import annotations

from pydantic import BaseModel


class Health(BaseModel):
    status: str
    version: str
    mode: str
