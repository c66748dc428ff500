"""The outbox: events, written in the transaction of what they tell of, read by the event stream.

``lifecycle`` appends; ``services`` reads, subscribes and trims. Ids only grow, so a client resumes from the last one it
saw. What is older than ``KEPT_FOR``, and all but the newest ``KEPT_EVENTS``, go; the newest event of all stays, so that
the ids which were given out are known.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from atelier.db.engine import Database, Subscription, signal
from atelier.db.tables import outbox, sandboxes, snapshots

KEPT_EVENTS = 100_000
KEPT_FOR = timedelta(days=7)
_TOPIC = "outbox"

_OWNER = func.coalesce(
    select(sandboxes.c.owner_id).where(sandboxes.c.id == bindparam("sandbox_id")).scalar_subquery(),
    # Of a sandbox that is gone something may be left.
    select(snapshots.c.owner_id).where(snapshots.c.sandbox_id == bindparam("sandbox_id")).limit(1).scalar_subquery(),
    "",
)
_INSERT = insert(outbox).values(
    at=bindparam("at"),
    kind=bindparam("kind"),
    sandbox_id=bindparam("sandbox_id"),
    payload=bindparam("payload"),
    owner_id=_OWNER,
)


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    """``kind`` is like ``sandbox.state_changed``; ``payload`` is JSON and depends on it. ``owner_id``: whose the sandbox
    was; empty: Atelier's own."""

    id: int
    at: datetime
    kind: str
    sandbox_id: str | None
    payload: dict[str, Any]
    owner_id: str


class Outbox:
    """``append`` works in the caller's transaction, as the reading methods do; ``subscribe`` needs none."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, connection: Connection, kind: str, sandbox_id: str | None, payload: dict[str, Any]) -> int:
        """Add an event; returns its id."""
        values = {"at": datetime.now(UTC), "kind": kind, "sandbox_id": sandbox_id, "payload": payload}
        result = connection.execute(_INSERT, values)
        assert result.inserted_primary_key is not None
        event_id = int(result.inserted_primary_key[0])
        signal(connection, _TOPIC)
        return event_id

    def read_after(self, connection: Connection, event_id: int, limit: int) -> list[OutboxEvent]:
        """The events after ``event_id``, oldest first."""
        query = select(outbox).where(outbox.c.id > event_id).order_by(outbox.c.id).limit(limit)
        return [
            OutboxEvent(row.id, row.at, row.kind, row.sandbox_id, row.payload, row.owner_id)
            for row in connection.execute(query)
        ]

    def bounds(self, connection: Connection) -> tuple[int, int]:
        """The oldest and the newest id that is kept, both 0 if there is none. A reader that wants to go on from before
        the oldest has missed something."""
        # Two queries in one: SQLite looks up one minimum or maximum, and for both together reads the whole table.
        oldest = select(func.min(outbox.c.id)).scalar_subquery()
        newest = select(func.max(outbox.c.id)).scalar_subquery()
        row = connection.execute(select(oldest, newest)).one()
        return row[0] or 0, row[1] or 0

    def trim(self, connection: Connection, now: datetime, limit: int) -> int:
        """Delete at most ``limit`` of the oldest events that need not be kept; returns how many went."""
        oldest, newest = self.bounds(connection)
        window = select(outbox.c.id, outbox.c.at).order_by(outbox.c.id).limit(limit)
        last = oldest - 1
        for row in connection.execute(window):
            if row.id == newest or (row.id > newest - KEPT_EVENTS and row.at >= now - KEPT_FOR):
                break
            last = row.id
        return connection.execute(delete(outbox).where(outbox.c.id <= last)).rowcount

    @contextmanager
    def subscribe(self) -> Generator[Subscription, None, None]:
        """Be woken when events were appended. Subscribe first, then read."""
        with self._database.subscribe(_TOPIC) as subscription:
            yield subscription
