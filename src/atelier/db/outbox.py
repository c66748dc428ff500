"""The outbox: events, written in the transaction of what they tell of, read by the event stream.

``lifecycle`` appends; ``services`` reads and subscribes. Ids only grow, so a client resumes from the last one it saw. The
newest ``KEPT_EVENTS`` are kept.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from atelier.db.engine import Database, Subscription, signal
from atelier.db.tables import outbox

KEPT_EVENTS = 10_000
_PRUNE_EVERY = 256
_TOPIC = "outbox"

_INSERT = insert(outbox)


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """``kind`` is like ``sandbox.state_changed``; ``payload`` is JSON and depends on it."""

    id: int
    at: datetime
    kind: str
    sandbox_id: str | None
    payload: dict[str, Any]


class Outbox:
    """``append`` works in the caller's transaction, as the reading methods do; ``subscribe`` needs none."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, connection: Connection, kind: str, sandbox_id: str | None, payload: dict[str, Any]) -> int:
        """Add an event; returns its id. Prunes now and then."""
        values = {"at": datetime.now(UTC), "kind": kind, "sandbox_id": sandbox_id, "payload": payload}
        result = connection.execute(_INSERT, values)
        assert result.inserted_primary_key is not None
        event_id = int(result.inserted_primary_key[0])
        if event_id % _PRUNE_EVERY == 0:
            connection.execute(delete(outbox).where(outbox.c.id <= event_id - KEPT_EVENTS))
        signal(connection, _TOPIC)
        return event_id

    def read_after(self, connection: Connection, event_id: int, limit: int) -> list[OutboxEvent]:
        """The events after ``event_id``, oldest first."""
        query = select(outbox).where(outbox.c.id > event_id).order_by(outbox.c.id).limit(limit)
        return [
            OutboxEvent(id=row.id, at=row.at, kind=row.kind, sandbox_id=row.sandbox_id, payload=row.payload)
            for row in connection.execute(query)
        ]

    def bounds(self, connection: Connection) -> tuple[int, int]:
        """The oldest and the newest id that is kept, both 0 if there is none. A reader that wants to go on from before
        the oldest has missed something."""
        row = connection.execute(select(func.min(outbox.c.id), func.max(outbox.c.id))).one()
        return row[0] or 0, row[1] or 0

    @contextmanager
    def subscribe(self) -> Generator[Subscription, None, None]:
        """Be woken when events were appended. Subscribe first, then read."""
        with self._database.subscribe(_TOPIC) as subscription:
            yield subscription
