"""The table of snapshots: what stands over what, what nothing needs, and the tree that closes over one that goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from atelier.db.engine import Connection, Database
from atelier.db.sandboxes import GuestSecrets, SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.model.errors import ConflictError, InvalidRequestError, NotFoundError
from atelier.model.ids import new_sandbox_id
from atelier.model.machine import MachineStamp
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.saved_machine import MachineRecord
from atelier.model.snapshot import Snapshot, SnapshotPurpose, SnapshotState
from atelier.model.states import SandboxState

NOW = datetime(2026, 1, 2, tzinfo=UTC)
snapshots, sandboxes = SnapshotRepository(), SandboxRepository()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(tmp_path / "atelier.db")
    opened.open()
    yield opened
    opened.close()


def snapshot(name: str, **fields: object) -> Snapshot:
    stamp = MachineStamp("fake", "1", "fake", "fake", "", 0, "none", 1)
    made = Snapshot(
        id=new_sandbox_id(),
        name=name,
        host_id="hostaaaaaaaa",
        state=SnapshotState.READY,
        purpose=SnapshotPurpose.USER,
        sandbox_id="boxaaaaaaaaa",
        sandbox_name="box",
        image="base",
        image_id="base-1",
        vcpu_count=1,
        memory_mib=512,
        disk_mib=4096,
        file_system_mib=4096,
        machine=MachineRecord(stamp, Path("/tools"), "tools-1", "6.1"),
        created_at=NOW,
        updated_at=NOW,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def sandbox(name: str, **fields: object) -> Sandbox:
    made = Sandbox(new_sandbox_id(), name, "hostaaaaaaaa", SandboxState.RUNNING, SandboxSpec(), NOW, NOW)
    return replace(made, **fields)  # type: ignore[arg-type]


async def add(database: Database, *rows: Snapshot | Sandbox) -> None:
    def insert(connection: Connection) -> None:
        for row in rows:
            if isinstance(row, Snapshot):
                snapshots.insert(connection, row)
            else:
                sandboxes.insert(connection, row, GuestSecrets("t" * 32, "m" * 32))

    await database.write(insert)


async def test_rows_come_back_as_they_went_in(database: Database) -> None:
    made = snapshot(
        "one", labels={"a": "b"}, environment={"C": "d"}, parent_id="p", base_id="b", keep_last=3, stopped_ms=1.5,
        checksums={"state": "x"}, failure_code="c", failure_message="m", failure_hint="h", template_key="k",
    )  # fmt: skip
    await add(database, made, sandbox("box", snapshot_id=made.id, disk_only=True))
    with database.read() as connection:
        assert snapshots.get(connection, "one") == snapshots.get(connection, made.id) == made
        box = sandboxes.get(connection, "box")
        assert (box.snapshot_id, box.disk_only) == (made.id, True)
        with pytest.raises(NotFoundError) as absent:
            snapshots.get(connection, "two")
    assert absent.value.code == "snapshot_not_found"
    with pytest.raises(ConflictError) as taken:
        await add(database, snapshot("one"))
    assert taken.value.code == "name_taken"


async def test_pages(database: Database) -> None:
    await add(database, *(snapshot(f"n{number}", labels={"team": "x"}) for number in range(5)))
    await add(
        database,
        snapshot("baking", state=SnapshotState.BAKING),
        snapshot("template", purpose=SnapshotPurpose.TEMPLATE),
        snapshot("others", sandbox_id="otheraaaaaaa", sandbox_name="other", labels={"team": "y", "tier": "x"}),
        snapshot("damaged", state=SnapshotState.DAMAGED),
    )

    def page(limit: int, cursor: str | None = None, **filters: Any) -> tuple[list[str], str | None]:
        shown = {
            "states": (SnapshotState.READY, SnapshotState.DAMAGED),
            "purposes": (SnapshotPurpose.USER, SnapshotPurpose.FORK),
        }
        with database.read() as connection:
            found, following = snapshots.list_page(connection, limit, cursor, **shown, **filters)
        return [each.name for each in found], following

    first, cursor = page(3)
    assert first == ["n0", "n1", "n2"]
    # One that was shown goes, one comes: none is shown twice, none left out.
    with database.read() as connection:
        gone = snapshots.get(connection, "n2").id
    await database.write(lambda connection: snapshots.delete(connection, gone))
    await add(database, snapshot("late"))
    second, cursor = page(4, cursor)
    assert second == ["n3", "n4", "others", "damaged"]
    assert page(3, cursor) == (["late"], None)
    assert page(7) == (["n0", "n1", "n3", "n4", "others", "damaged", "late"], None)
    assert page(9, sandbox="other") == page(9, sandbox="otheraaaaaaa") == (["others"], None)
    assert page(9, labels={"team": "x"}) == (["n0", "n1", "n3", "n4"], None)
    assert page(9, labels={"team": "y", "tier": "x"}, sandbox="box") == ([], None)
    with pytest.raises(InvalidRequestError) as refused:
        page(3, "nonsense")
    assert refused.value.code == "invalid_cursor"


async def test_dependants_are_what_stands_over_its_disk(database: Database) -> None:
    base = snapshot("base")
    later = snapshot("later", parent_id=base.id)
    above = snapshot("above", parent_id=base.id, base_id=base.id)
    second = snapshot("second", parent_id=above.id, base_id=base.id)
    holder = sandbox("holder", snapshot_id=base.id)
    failed = sandbox("failed", snapshot_id=base.id, holds_volume=False)
    await add(database, base, later, above, second, holder, failed)
    with database.read() as connection:
        assert snapshots.list_dependants(connection, base.id) == (["holder"], ["above", "second"])
        assert snapshots.list_dependants(connection, above.id) == ([], []), "below it in the tree is not over its disk"


async def test_the_tree_closes_over_one_that_goes(database: Database) -> None:
    first = snapshot("first")
    middle = snapshot("middle", parent_id=first.id)
    last = snapshot("last", parent_id=middle.id)
    await add(database, first, middle, last)
    await database.write(lambda connection: snapshots.delete(connection, middle.id))
    with database.read() as connection:
        assert snapshots.get(connection, "last").parent_id == first.id
    await database.write(lambda connection: snapshots.delete(connection, first.id))
    with database.read() as connection:
        assert snapshots.get(connection, "last").parent_id is None


async def test_what_was_made_for_forks_and_is_needed_by_none(database: Database) -> None:
    fork = SnapshotPurpose.FORK
    rows = {name: snapshot(name, purpose=fork) for name in ("spent", "used", "failed-use", "below")}
    await add(
        database,
        *rows.values(),
        snapshot("users"),
        snapshot("over", base_id=rows["below"].id),
        sandbox("a", snapshot_id=rows["used"].id),
        sandbox("b", snapshot_id=rows["failed-use"].id, holds_volume=False),
    )
    with database.read() as connection:
        assert [each.name for each in snapshots.list_unneeded_forks(connection)] == ["spent"]
