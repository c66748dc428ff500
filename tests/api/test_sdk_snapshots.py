"""Pause, snapshots and forks through ``Sandbox``, ``Snapshot`` and their asyncio kin."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from tests.running_manager import RunningManager

from atelier import AsyncSandbox, AsyncSnapshot, Sandbox, Snapshot
from atelier.client import snapshot_calls
from atelier.client.connection import AsyncConnection, Connection
from atelier.client.environment import Endpoint
from atelier.client.sandbox_failures import SandboxFailedError
from atelier.client.snapshots import SnapshotFailedError
from atelier.model.errors import (
    CapacityError,
    ConflictError,
    DiskFullError,
    InvalidRequestError,
    NotFoundError,
    TimeoutExceededError,
)

from .manager_inside import ManagerInside


@pytest.fixture
def connection(manager: RunningManager, api: httpx.Client) -> Iterator[Connection]:
    del api  # destroys what a test leaves
    with Connection(Endpoint(manager.url, manager.key)) as opened:
        yield opened
        for snapshot in Snapshot.list(connection=opened):
            for sandbox in Sandbox.list(connection=opened):
                sandbox.destroy()
            snapshot.delete()


@pytest.fixture
async def link(inside: ManagerInside) -> AsyncIterator[AsyncConnection]:
    key = inside.client.headers["Authorization"].removeprefix("Bearer ")
    transport = httpx.ASGITransport(inside.installation.application)
    async with AsyncConnection(Endpoint("http://127.0.0.1", key), transport=transport) as opened:
        yield opened


def test_pause_and_resume(connection: Connection) -> None:
    with Sandbox.create(connection=connection) as box:
        box.files.write("/tmp/kept", b"here")
        assert box.pause().state == "paused"
        with pytest.raises(ConflictError) as refused:
            box.pause()
        assert refused.value.code == "invalid_state"
        assert box.resume().state == "running"
        with pytest.raises(ConflictError):
            box.resume()
        box.pause()
        assert box.run(["true"]).exit_code == 0, "its use wakes it"
        assert box.refresh().state == "running"
        assert box.files.read("/tmp/kept") == "here"
        box.pause()
        assert box.resume(from_disk=True).state == "running"
        assert box.pause(wait=False).state in ("pausing", "paused")


def test_snapshots(connection: Connection) -> None:
    with Sandbox.create(connection=connection, memory_mib=1024) as box:
        box.files.write("/tmp/before", b"1")
        ready = box.snapshot("ready", labels={"job": "7"})
        assert (ready.name, ready.state, ready.details.sandbox_id) == ("ready", "ready", box.id)
        assert repr(ready) == f"<Snapshot ready ({ready.id}) ready>"
        with pytest.raises(ConflictError) as taken:
            box.snapshot("ready")
        assert taken.value.code == "name_taken"
        box.files.write("/tmp/after", b"2")
        for reference in (ready, "ready"):
            with Sandbox.create(snapshot=reference, connection=connection) as other:
                assert (other.details.snapshot_id, other.details.memory_mib) == (ready.id, 1024)
                assert other.files.read("/tmp/before") == "1"
                with pytest.raises(NotFoundError):
                    other.files.read("/tmp/after")
                with pytest.raises(ConflictError) as needed:
                    ready.delete()
                assert needed.value.code == "snapshot_in_use"
        with pytest.raises(InvalidRequestError) as fixed:
            Sandbox.create(snapshot="ready", memory_mib=512, connection=connection)
        assert fixed.value.code == "fixed_by_snapshot", "also where it is the default elsewhere"
        with Sandbox.create(snapshot="ready", disk_only=True, memory_mib=512, connection=connection) as booted:
            assert booted.details.memory_mib == 512
        assert [each.id for each in Snapshot.list(sandbox=box.name, labels={"job": "7"}, connection=connection)] == [
            ready.id
        ]
        assert Snapshot.list(labels={"job": "8"}, connection=connection) == []
        latest = box.snapshot(keep_last=1)
        deadline = time.monotonic() + 60
        with pytest.raises(NotFoundError):
            while time.monotonic() < deadline:
                ready.refresh()
                time.sleep(0.02)
        ready.delete()
        assert Snapshot.connect(latest.name, connection=connection).details.parent_id is None
        latest.delete()
        box.stop()
        with pytest.raises(ConflictError):
            box.snapshot()


def test_lists_follow_their_pages(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atelier.client.snapshots._PAGE", 2)
    with Sandbox.create(connection=connection) as box:
        made = [box.snapshot(f"n{number}").id for number in range(5)]
        assert [each.id for each in Snapshot.list(connection=connection)] == made
        page = connection.send(snapshot_calls.list_snapshots(limit=4, cursor=None, sandbox=None, labels=None))
        assert [each.id for each in page.items] == made[:4]
        assert page.next_cursor
        rest = snapshot_calls.list_snapshots(limit=1, cursor=page.next_cursor, sandbox=box.name, labels=None)
        assert connection.send(rest).next_cursor is None
        for limit, cursor, code in (
            (0, None, "invalid_request"),
            (501, None, "invalid_request"),
            (1, "x", "invalid_cursor"),
        ):
            wrong = snapshot_calls.list_snapshots(limit=limit, cursor=cursor, sandbox=None, labels=None)
            with pytest.raises(InvalidRequestError) as refused:
                connection.send(wrong)
            assert refused.value.code == code
        for each in Snapshot.list(connection=connection):
            each.delete()


def test_forks(connection: Connection) -> None:
    with Sandbox.create(connection=connection, name="parent", labels={"team": "web"}) as box:
        box.files.write("/tmp/before", b"1")
        forks = box.fork(3, labels={"job": "7"})
        assert [(each.name, each.state) for each in forks] == [(f"parent-{n}", "running") for n in (1, 2, 3)]
        assert {each.files.read("/tmp/before") for each in forks} == {"1"}
        assert all(each.details.labels == {"team": "web", "job": "7"} for each in forks)
        (again,) = box.fork(name_prefix="worker", wait=False)
        assert again.name == "worker-1"
        for each in (*forks, again):
            with each:
                assert each.destroy_on_exit
        with pytest.raises(CapacityError) as full:
            box.fork(9999)
        assert "would fit" in full.value.message
        for count in (0, -1):
            with pytest.raises(InvalidRequestError):
                box.fork(count)


async def test_on_asyncio(inside: ManagerInside, link: AsyncConnection) -> None:
    async with await AsyncSandbox.create(connection=link, name="box") as box:
        assert (await box.pause()).state == "paused"
        assert (await box.resume()).state == "running"
        ready = await box.snapshot("ready")
        assert (await ready.refresh()).state == "ready"
        assert [each.name for each in await AsyncSnapshot.list(connection=link)] == ["ready"]
        assert (await AsyncSnapshot.connect("ready", connection=link)).id == ready.id
        async with await AsyncSandbox.create(snapshot=ready, connection=link) as other:
            assert other.details.snapshot_id == ready.id
        forks = await box.fork(2)
        assert [each.name for each in forks] == ["box-1", "box-2"]
        for each in forks:
            await each.destroy()
        await ready.delete()
        await ready.delete()
        await ready.close()


async def test_what_goes_wrong_is_raised_with_the_managers_words(inside: ManagerInside, link: AsyncConnection) -> None:
    box = await AsyncSandbox.create(connection=link, name="box")
    full = DiskFullError("no space left", hint="make room")
    inside.vmm.faults.fail_next("save", full, times=10)
    with pytest.raises(SnapshotFailedError) as failed:
        await box.snapshot("ready")
    assert (failed.value.code, failed.value.hint) == ("disk_full", "make room")
    assert failed.value.message == "the snapshot ready of box failed: no space left"
    with pytest.raises(DiskFullError):
        await box.fork(2)
    with pytest.raises(SandboxFailedError) as running:
        await box.pause()
    assert running.value.message == "the sandbox box is running: no space left"
    inside.vmm.faults._failures.clear()
    inside.vmm.faults.hang("bake")
    with pytest.raises(TimeoutExceededError) as late:
        await box.snapshot("slow", timeout_seconds=0.2)
    assert "atelier snapshots get slow" in late.value.hint
    inside.vmm.faults.release("bake")
    inside.guests.faults.fail_next("initialize", DiskFullError("no space left"))
    with pytest.raises(SandboxFailedError) as fork:
        await box.fork(name_prefix="lost")
    assert fork.value.details.name == "lost-1"
