"""The event stream: tails the outbox, so that a client can resume at any event id that is still kept, and is told where
events are missing. Also lets old events go, which the manager's background loop asks for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

from pydantic import JsonValue

from atelier.db.engine import Database
from atelier.db.outbox import Outbox
from atelier.db.sandbox_access import SandboxAccessRepository
from atelier.schemas.events import Event

_PAGE = 200
_TRIM_LIMIT = 1000
"""Rows that one transaction deletes: some milliseconds."""


class EventService:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._outbox = Outbox(database)
        self._access = SandboxAccessRepository()

    async def follow(
        self, after: int | None, sandbox_id: str = "", viewer_id: str | None = None
    ) -> AsyncIterator[Event]:
        """Events behind the id ``after`` (None: from now on), for ever. ``viewer_id``: only of sandboxes of this user's,
        and of those that are shared with them when the event is read. Where events are missing, ``stream.gap`` comes
        in their place, at the start as later, when the reader is slower than old events go."""
        with self._outbox.subscribe() as news:
            with self._database.read() as connection:
                _, newest = self._outbox.bounds(connection)
            position = newest if after is None else after
            shared: frozenset[str] = frozenset()
            if position > newest:
                # An id that this database never gave out: it began anew, or it is an older one brought back.
                yield _gap("unknown_id", position + 1, newest)
                position = newest
            while True:
                news.clear()
                with self._database.read() as connection:
                    oldest, _ = self._outbox.bounds(connection)
                    page = self._outbox.read_after(connection, position, _PAGE)
                    if viewer_id is not None:
                        shared = self._access.list_shared_with(connection, viewer_id)
                if position < oldest - 1:
                    yield _gap("trimmed", position + 1, oldest - 1)
                for event in page:
                    position = event.id
                    is_visible = viewer_id in (None, event.owner_id) or event.sandbox_id in shared
                    if is_visible and (not sandbox_id or event.sandbox_id == sandbox_id):
                        yield Event(
                            id=event.id,
                            at=event.at,
                            kind=event.kind,
                            sandbox_id=event.sandbox_id,
                            payload=event.payload,
                        )
                if len(page) < _PAGE:
                    await news.wait()

    async def trim(self) -> int:
        """Let old events go, a few at a time, so that no other write waits long; returns how many went."""
        gone = 0
        while True:
            went = await self._database.write(lambda connection: self._outbox.trim(connection, _now(), _TRIM_LIMIT))
            gone += went
            if went < _TRIM_LIMIT:
                return gone


def _gap(reason: str, first_lost_id: int, last_lost_id: int) -> Event:
    """Its id is the last that is lost, so a client that resumes from it goes on behind the gap. For an ``unknown_id``
    nobody can say what is lost, and ``first_lost_id`` is beyond the last."""
    payload: dict[str, JsonValue] = {
        "reason": reason,
        "first_lost_id": first_lost_id,
        "last_lost_id": last_lost_id,
    }
    return Event(id=last_lost_id, at=_now(), kind="stream.gap", payload=payload)


def _now() -> datetime:
    return datetime.now(UTC)
