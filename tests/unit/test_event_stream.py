"""The event stream over the outbox: resuming, and saying so where events are missing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from atelier.db import outbox
from atelier.db.engine import Connection, Database
from atelier.db.outbox import Outbox
from atelier.services import events
from atelier.services.events import EventService


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(tmp_path / "atelier.db")
    made.open()
    yield made
    made.close()


async def append(database: Database, count: int) -> None:
    def insert(connection: Connection) -> None:
        for _ in range(count):
            Outbox(database).append(connection, "k", "x", {})

    await database.write(insert)


async def take(stream: AsyncIterator[events.Event], count: int) -> list[tuple[int, str]]:
    return [((event := await anext(stream)).id, event.kind) for _ in range(count)]


async def test_a_client_that_resumes_before_the_oldest_event_is_told(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "KEPT_EVENTS", 3)
    monkeypatch.setattr(events, "_TRIM_LIMIT", 2)
    service = EventService(database)
    await append(database, 10)
    assert await service.trim() == 7
    async with aclosing(service.follow(2)) as stream:
        gap = await anext(stream)
        assert (gap.id, gap.kind) == (7, "stream.gap")
        assert gap.payload == {"reason": "trimmed", "first_lost_id": 3, "last_lost_id": 7}
        assert await take(stream, 3) == [(8, "k"), (9, "k"), (10, "k")]
    async with aclosing(service.follow(7)) as stream:
        assert await take(stream, 1) == [(8, "k")], "nothing is missing behind the gap's own id"


async def test_a_reader_that_is_slower_than_events_go_is_told(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "KEPT_EVENTS", 3)
    monkeypatch.setattr(events, "_PAGE", 2)
    service = EventService(database)
    await append(database, 10)
    async with aclosing(service.follow(0)) as stream:
        assert await take(stream, 1) == [(1, "k")]
        await service.trim()
        assert await take(stream, 3) == [(2, "k"), (7, "stream.gap"), (8, "k")]


async def test_an_id_that_was_never_given_out_is_said(database: Database) -> None:
    await append(database, 4)
    async with aclosing(EventService(database).follow(900)) as stream:
        gap = await anext(stream)
        assert (gap.id, gap.kind, gap.payload["reason"]) == (4, "stream.gap", "unknown_id")
        await append(database, 1)
        assert await take(stream, 1) == [(5, "k")]


async def test_an_empty_outbox_has_no_gap(database: Database) -> None:
    async with aclosing(EventService(database).follow(0)) as stream:
        await append(database, 1)
        assert await take(stream, 1) == [(1, "k")]
