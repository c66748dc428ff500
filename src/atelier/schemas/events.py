"""Events, as the stream ``/api/v1/events`` sends them (server-sent events; ``id`` is the SSE id)."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, JsonValue


class Event(BaseModel):
    """``kind`` is like ``sandbox.state_changed``; ``payload`` depends on it."""

    id: int
    at: datetime
    kind: str
    sandbox_id: str | None = None
    payload: dict[str, JsonValue]
