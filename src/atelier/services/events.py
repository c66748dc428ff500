"""The event stream: tails the outbox, so that a client can resume at any event id that is still kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

from atelier.db.engine import Database
from atelier.db.outbox import Outbox
from atelier.schemas.events import Event

_PAGE = 200


class EventService:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._outbox = Outbox(database)

    async def follow(self, after: int | None, sandbox_id: str = "") -> AsyncIterator[Event]:
        """Events behind the id ``after`` (None: from now on), for ever. Yields ``stream.gap`` first when events between
        ``after`` and the oldest kept one are lost."""
        with self._outbox.subscribe() as news:
            with self._database.read() as connection:
                oldest, newest = self._outbox.bounds(connection)
            position = newest if after is None else after
            if after is not None and after < oldest - 1:
                position = oldest - 1
                lost = {"first_lost_id": after + 1, "last_lost_id": position}
                yield Event(id=position, at=datetime.now(UTC), kind="stream.gap", payload=dict(lost))
            while True:
                news.clear()
                with self._database.read() as connection:
                    page = self._outbox.read_after(connection, position, _PAGE)
                for event in page:
                    position = event.id
                    if not sandbox_id or event.sandbox_id == sandbox_id:
                        yield Event(
                            id=event.id,
                            at=event.at,
                            kind=event.kind,
                            sandbox_id=event.sandbox_id,
                            payload=event.payload,
                        )
                if len(page) < _PAGE:
                    await news.wait()
