"""The repositories on a real SQLite file: sandboxes, the saga store, the outbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from atelier.db import outbox, sagas
from atelier.db.engine import Connection, Database
from atelier.db.outbox import Outbox
from atelier.db.sandboxes import GuestSecrets, SandboxRepository, Usage
from atelier.model.errors import CapacityError, ConflictError, InvalidRequestError, NotFoundError
from atelier.model.ids import new_sandbox_id
from atelier.model.machine import ProcessIdentity
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState
from atelier.saga.log import SagaGoneError, SagaLog, SagaRecord, SagaStatus

NOW = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)

sandboxes = SandboxRepository()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(tmp_path / "atelier.db")
    made.open()
    yield made
    made.close()


def sandbox(name: str, state: SandboxState = SandboxState.CREATING, **spec: Any) -> Sandbox:
    return Sandbox(
        id=new_sandbox_id(),
        name=name,
        host_id="hostaaaaaaaa",
        state=state,
        spec=SandboxSpec(**spec),
        created_at=NOW,
        updated_at=NOW,
    )


async def add(database: Database, *added: Sandbox) -> None:
    def insert(connection: Connection) -> None:
        for each in added:
            sandboxes.insert(connection, each, GuestSecrets(f"token-{each.id}", "m" * 32))

    await database.write(insert)


async def test_a_row_comes_back_as_it_went_in(database: Database) -> None:
    made = replace(
        sandbox(
            "one", environment={"A": "ü\n"}, labels={"team": "x", 'odd"key.$': "1"}, vcpu_count=3, image_id="base-1"
        ),
        created_at=NOW.astimezone(),
        failure_code="c",
        failure_message="m",
        failure_hint="h",
        console_tail="tail",
    )
    await add(database, made)
    with database.read() as connection:
        assert sandboxes.get(connection, "one") == made
        assert sandboxes.get(connection, made.id) == made
        assert sandboxes.get_secrets(connection, made.id) == GuestSecrets(f"token-{made.id}", "m" * 32)
        assert sandboxes.find(connection, "two") is None
        with pytest.raises(NotFoundError) as missing:
            sandboxes.get(connection, "two")
        assert missing.value.code == "sandbox_not_found"
        with pytest.raises(NotFoundError):
            sandboxes.get_secrets(connection, "two")


async def test_a_name_is_taken_once(database: Database) -> None:
    await add(database, sandbox("one"))
    with pytest.raises(ConflictError) as taken:
        await add(database, sandbox("two"), sandbox("one"))
    assert taken.value.code == "name_taken"
    assert taken.value.hint
    with database.read() as connection:
        assert sandboxes.find(connection, "two") is None  # all or nothing


async def test_pages_are_stable_while_sandboxes_come_and_go(database: Database) -> None:
    await add(database, *(sandbox(f"n{number}") for number in range(10)))
    seen: list[str] = []
    cursor: str | None = None
    for turn in range(10):
        with database.read() as connection:
            page, cursor = sandboxes.list_page(connection, 3, cursor)
        seen += [each.name for each in page]
        await add(database, sandbox(f"late{turn}"))
        if turn == 0:
            with database.read() as connection:
                gone = sandboxes.get(connection, "n7").id  # the last one shown
            await database.write(lambda connection, gone=gone: sandboxes.delete(connection, gone))
        if cursor is None:
            break
    assert seen == [f"n{number}" for number in reversed(range(10))]


@pytest.mark.parametrize(("count", "limit", "pages"), [(0, 5, 1), (5, 5, 1), (6, 5, 2)])
async def test_the_last_page_has_no_cursor(database: Database, count: int, limit: int, pages: int) -> None:
    await add(database, *(sandbox(f"n{number}") for number in range(count)))
    cursor: str | None = None
    for turn in range(pages):
        with database.read() as connection:
            _, cursor = sandboxes.list_page(connection, limit, cursor)
        assert (cursor is None) == (turn == pages - 1)


@pytest.mark.parametrize(
    "cursor", ["", "x", "!!!!", "ü", "c3h4", "czEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz", "czE=czE=", "\x00"]
)
async def test_a_foreign_cursor_is_refused(database: Database, cursor: str) -> None:
    with database.read() as connection, pytest.raises(InvalidRequestError) as refused:
        sandboxes.list_page(connection, 3, cursor)
    assert refused.value.code == "invalid_cursor"


async def test_filters(database: Database) -> None:
    await add(
        database,
        sandbox("a", SandboxState.RUNNING, labels={"team": "x", "tier": "1"}),
        sandbox("b", SandboxState.FAILED, labels={"team": "x"}),
        sandbox("c", SandboxState.RUNNING, labels={"team": "y"}),
        sandbox("d", SandboxState.RUNNING, labels={'we"ird.key': "x"}),
    )

    def listed(**filters: Any) -> list[str]:
        with database.read() as connection:
            return [each.name for each in sandboxes.list_page(connection, 10, **filters)[0]]

    assert listed() == ["d", "c", "b", "a"]
    assert listed(state=SandboxState.RUNNING) == ["d", "c", "a"]
    assert listed(labels={"team": "x"}) == ["b", "a"]
    assert listed(labels={"team": "x", "tier": "1"}) == ["a"]
    assert listed(labels={"team": "x"}, state=SandboxState.RUNNING) == ["a"]
    assert listed(labels={'we"ird.key': "x"}) == ["d"]
    assert listed(labels={"absent": "x"}) == []
    with database.read() as connection:
        assert sandboxes.count_by_state(connection) == {SandboxState.RUNNING: 3, SandboxState.FAILED: 1}
        assert len(sandboxes.list_ids(connection, [SandboxState.FAILED])) == 1
        assert len(sandboxes.list_ids(connection)) == 4


async def test_usage_counts_machines_that_exist_and_volumes_that_are_held(database: Database) -> None:
    size = {"vcpu_count": 2, "memory_mib": 512, "disk_mib": 4096}
    stopped = sandbox("stopped", SandboxState.STOPPED, **size)
    failed = sandbox("failed", SandboxState.FAILED, **size)
    elsewhere = replace(sandbox("elsewhere", **size), host_id="otheraaaaaaa")
    await add(database, sandbox("creating", **size), sandbox("destroying", SandboxState.DESTROYING, **size))
    await add(database, stopped, failed, elsewhere)
    await database.write(lambda connection: sandboxes.set_holds_volume(connection, failed.id, False))
    with database.read() as connection:
        assert sandboxes.sum_usage(connection, "hostaaaaaaaa") == Usage(4, 1024, 3 * 4096, slots=3)
        assert sandboxes.sum_usage(connection, "nobodyaaaaaa") == Usage(0, 0, 0, slots=0)


async def test_columns_that_lifecycle_writes(database: Database) -> None:
    made = sandbox("one")
    await add(database, made)
    identity = ProcessIdentity(12, 345678901234, "boot")
    later = NOW + timedelta(seconds=1)

    def change(connection: Connection) -> None:
        sandboxes.set_image_id(connection, made.id, "base-2")
        sandboxes.set_vmm_process(connection, made.id, identity)
        sandboxes.set_state(connection, made.id, SandboxState.FAILED, later, failure_code="c", console_tail="t")

    await database.write(change)
    with database.read() as connection:
        found = sandboxes.get(connection, "one")
        assert (found.state, found.updated_at, found.spec.image_id) == (SandboxState.FAILED, later, "base-2")
        assert (found.failure_code, found.console_tail) == ("c", "t")
        assert sandboxes.find_vmm_process(connection, made.id) == identity
    await database.write(lambda connection: sandboxes.set_vmm_process(connection, made.id, None))
    with database.read() as connection:
        assert sandboxes.find_vmm_process(connection, made.id) is None


# --- the saga store -----------------------------------------------------------------------------------------------


async def test_saga_records_come_back_as_they_went_in(database: Database) -> None:
    store: SagaLog[Connection] = sagas.SagaStore(database)
    record = SagaRecord("s1", "kind", "subject", "a", inputs={"n": 1}, outputs={"z": {"deep": [1, None, "ü"]}})
    await database.write(lambda connection: store.insert(connection, record))
    assert store.find("s1") == record
    assert store.list_open() == [record]

    ended = await store.update("s1", lambda stored: replace(stored, status=SagaStatus.COMPLETED, step="c"))
    assert ended == replace(record, status=SagaStatus.COMPLETED, step="c") == store.find("s1")
    assert store.list_open() == []
    with pytest.raises(SagaGoneError):
        await store.update("nope", lambda stored: stored)
    assert store.find("nope") is None


async def test_a_saga_update_and_its_hook_are_one_transaction(database: Database) -> None:
    store = sagas.SagaStore(database)
    made = sandbox("one")
    await add(database, made)
    await database.write(lambda connection: store.insert(connection, SagaRecord("s1", "kind", made.id, "a")))

    def fail(connection: Connection, record: SagaRecord) -> None:
        sandboxes.delete(connection, made.id)
        raise PermissionError

    with pytest.raises(PermissionError):
        await store.update("s1", lambda stored: replace(stored, step="b"), fail)
    found = store.find("s1")
    assert found is not None
    assert found.step == "a"

    def remove(connection: Connection, record: SagaRecord) -> None:
        assert record.step == "b"
        sandboxes.delete(connection, made.id)
        sagas.delete_sagas_of(connection, made.id)

    await store.update("s1", lambda stored: replace(stored, step="b"), remove)
    assert store.find("s1") is None


async def test_leases_are_the_lowest_that_are_free_and_each_is_one_sandboxs(database: Database) -> None:
    made = [sandbox(f"n{number}") for number in range(4)]
    elsewhere = replace(sandbox("elsewhere"), host_id="otheraaaaaaa")
    await add(database, *made, elsewhere)

    async def take(of: Sandbox, slot_count: int | None = None) -> int:
        return await database.write(lambda connection: sandboxes.take_lease(connection, of.id, slot_count))

    assert [await take(each) for each in made[:3]] == [0, 1, 2]
    assert await take(made[1]) == 1, "twice is once"
    assert await take(elsewhere) == 0, "another host has its own"
    await database.write(lambda connection: sandboxes.release_lease(connection, made[1].id))
    with database.read() as connection, pytest.raises(NotFoundError):
        sandboxes.get_lease(connection, made[1].id)
    assert await take(made[3]) == 1
    with pytest.raises(CapacityError) as full:
        await take(made[1], slot_count=3)
    assert full.value.code == "no_addresses_left"
    await database.write(lambda connection: sandboxes.delete(connection, made[0].id))
    assert await take(made[1], slot_count=3) == 0
    with database.read() as connection:
        assert sandboxes.get_lease(connection, made[1].id) == 0


async def test_open_sagas_of_a_subject_are_found(database: Database) -> None:
    store = sagas.SagaStore(database)

    def insert(connection: Connection) -> None:
        store.insert(connection, SagaRecord("s1", "create", "x", "a", status=SagaStatus.UNWOUND))
        store.insert(connection, SagaRecord("s2", "create", "x", "a"))
        store.insert(connection, SagaRecord("s3", "stop", "x", "a", status=SagaStatus.STUCK_RUNNING))

    await database.write(insert)
    with database.read() as connection:
        assert [record.id for record in sagas.list_open_sagas_of(connection, "x")] == ["s2", "s3"]
    oldest = store.find("s2")
    assert oldest is not None
    assert [record.id for record in store.list_younger(oldest)] == ["s3"]


# --- the outbox ---------------------------------------------------------------------------------------------------


async def test_events_are_read_in_order_and_resumed(database: Database) -> None:
    for number in range(5):
        await database.write(lambda connection, n=number: Outbox(database).append(connection, "k", "x", {"n": n}))
    with database.read() as connection:
        first = Outbox(database).read_after(connection, 0, 2)
        rest = Outbox(database).read_after(connection, first[-1].id, 100)
        assert Outbox(database).bounds(connection) == (first[0].id, rest[-1].id)
    assert [event.payload["n"] for event in first + rest] == [0, 1, 2, 3, 4]
    assert (first[0].kind, first[0].sandbox_id) == ("k", "x")
    assert first[0].at.tzinfo is not None


async def test_an_event_of_a_failed_transaction_never_was(database: Database) -> None:
    def fail(connection: Connection) -> None:
        Outbox(database).append(connection, "k", None, {})
        raise ValueError

    with pytest.raises(ValueError):
        await database.write(fail)
    with database.read() as connection:
        assert Outbox(database).read_after(connection, 0, 10) == []
        assert Outbox(database).bounds(connection) == (0, 0)


async def test_old_events_go_a_few_at_a_time_and_ids_are_never_used_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "KEPT_EVENTS", 100)
    events = Outbox(database)

    def append(connection: Connection) -> None:
        for _ in range(1000):
            events.append(connection, "k", None, {})

    async def trim(now: datetime) -> int:
        return await database.write(lambda connection: events.trim(connection, now, 400))

    def bounds() -> tuple[int, int]:
        with database.read() as connection:
            return events.bounds(connection)

    await database.write(append)
    soon = datetime.now(UTC)
    assert [await trim(soon) for _ in range(4)] == [400, 400, 100, 0]
    assert bounds() == (901, 1000)
    assert await trim(soon + outbox.KEPT_FOR - timedelta(minutes=1)) == 0
    assert await trim(soon + outbox.KEPT_FOR + timedelta(minutes=1)) == 99
    assert bounds() == (1000, 1000), "the newest stays, however old it is"
    assert await trim(soon + 2 * outbox.KEPT_FOR) == 0
    await database.write(lambda connection: connection.exec_driver_sql("DELETE FROM outbox"))
    assert await trim(soon) == 0
    assert await database.write(lambda connection: events.append(connection, "k", None, {})) == 1001


async def test_a_tail_wakes_without_polling(database: Database) -> None:
    received: list[int] = []

    async def tail() -> None:
        with Outbox(database).subscribe() as subscription:
            last = 0
            while len(received) < 20:
                subscription.clear()
                with database.read() as connection:
                    events = Outbox(database).read_after(connection, last, 3)
                received.extend(event.payload["n"] for event in events)
                if events:
                    last = events[-1].id
                else:
                    await subscription.wait()

    task = asyncio.create_task(tail())
    for number in range(20):
        await database.write(lambda connection, n=number: Outbox(database).append(connection, "k", None, {"n": n}))
    await asyncio.wait_for(task, 20)
    assert received == list(range(20))
