"""The sagas of snapshots hurt at every place, on fakes: nothing half-made is ever listed, and the sandbox runs on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.lifecycle.conftest import Host
from tests.lifecycle.crash_program import FileDrivers, make_lifecycle
from tests.lifecycle.sabotage import Place, disturb, places

from atelier.db.sagas import list_open_sagas_of
from atelier.db.snapshots import SnapshotRepository
from atelier.lifecycle import snapshot_bake, snapshot_take
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import HostError
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.snapshot import Snapshot, SnapshotPurpose, SnapshotState
from atelier.model.states import SandboxState
from atelier.saga.definition import SagaDefinition

KINDS = (snapshot_take.KIND, snapshot_bake.KIND)


def find_sagas(*kinds: str) -> tuple[SagaDefinition[object], ...]:
    async def build() -> tuple[SagaDefinition[object], ...]:
        _, lifecycle = make_lifecycle(Path("/nonexistent"), FileDrivers(Path("/nonexistent")), opened=False)
        return tuple(each for each in lifecycle.sagas if each.kind in kinds)  # type: ignore[return-value]

    return asyncio.run(build())


SAGAS = find_sagas(*KINDS)
DOS = places(SAGAS, "do")
BAKING = [place for place in DOS if place.kind == snapshot_bake.KIND]
TAKING = [place for place in DOS if place.kind == snapshot_take.KIND]


def snapshots(host: Host, *states: SnapshotState) -> list[Snapshot]:
    with host.database.read() as connection:
        return SnapshotRepository().list_in(connection, states)


def kept(host: Host) -> list[str]:
    """All that snapshots hold on this host."""
    folders = host.data.snapshots.iterdir() if host.data.snapshots.exists() else ()
    return [*host.storage.snapshots, *host.storage.freezing, *(folder.name for folder in folders)]


async def settled(lifecycle: SandboxLifecycle, snapshot_id: str) -> Snapshot:
    found = await lifecycle.snapshots.wait_settled(snapshot_id, 30)
    assert found is not None, "it did not settle"
    return found


def check_runs_on(host: Host, sandbox: Sandbox) -> None:
    row = host.row(sandbox.id)
    assert row is not None
    assert (row.state, row.failure_code) == (SandboxState.RUNNING, "")
    assert not host.vmm.is_stopped(sandbox.id)
    assert not host.guests._guests[sandbox.id].movement.is_still
    with host.database.read() as connection:
        assert list_open_sagas_of(connection, sandbox.id) == []


async def check_works_again(host: Host, lifecycle: SandboxLifecycle, sandbox: Sandbox) -> None:
    """A snapshot can be taken, serves, and goes; and with the sandbox nothing is left."""
    again = await settled(lifecycle, (await lifecycle.snapshots.take(sandbox.id, "again")).id)
    assert again.state is SnapshotState.READY, again.failure_message
    other = await lifecycle.start_create("other", SandboxSpec(), snapshot_id=again.id)
    row = await lifecycle.wait_settled(other.id, 30)
    assert row is not None
    assert row.state is SandboxState.RUNNING, row.failure_message
    await lifecycle.destroy(other.id)
    for each in snapshots(host):
        await lifecycle.snapshots.delete(each.id)
    await lifecycle.destroy(sandbox.id)
    assert host.held() == []
    assert kept(host) == []


async def held_at(host: Host, place: Place) -> tuple[SandboxLifecycle, Sandbox, Snapshot]:
    """A manager that stands still at ``place`` while it takes a snapshot."""
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    reached_it = asyncio.Event()

    async def hang(reached: Place) -> None:
        if reached == place:
            reached_it.set()
            await asyncio.Event().wait()

    disturb(lifecycle, hang)
    begun = await lifecycle.snapshots.take(sandbox.id, "one")
    await asyncio.wait_for(reached_it.wait(), 30)
    return lifecycle, sandbox, begun


@pytest.mark.parametrize("place", DOS, ids=str)
async def test_an_error_at_any_place(host: Host, place: Place) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    errors = [HostError("broken on purpose", code="on_purpose")]

    async def fail(reached: Place) -> None:
        if reached == place and errors:
            raise errors.pop()

    disturb(lifecycle, fail)
    failed = await settled(lifecycle, (await lifecycle.snapshots.take(sandbox.id, "one")).id)
    assert errors == []
    assert (failed.state, failed.failure_code) == (SnapshotState.FAILED, "on_purpose")
    assert kept(host) == []
    check_runs_on(host, sandbox)
    await check_works_again(host, lifecycle, sandbox)


@pytest.mark.parametrize("place", DOS, ids=str)
async def test_a_manager_that_ends_at_any_place(host: Host, place: Place) -> None:
    """What was being taken is taken back, what was saved already is made ready."""
    lifecycle, sandbox, begun = await held_at(host, place)
    await lifecycle.close()
    assert snapshots(host, SnapshotState.READY) == []
    after = host.lifecycle()
    await after.recover()
    found = await settled(after, begun.id)
    is_taken_back = place.kind == snapshot_take.KIND
    expected = (SnapshotState.FAILED, "interrupted") if is_taken_back else (SnapshotState.READY, "")
    assert (found.state, found.failure_code) == expected, found.failure_message
    await after.wait_settled(sandbox.id, 30)
    check_runs_on(host, sandbox)
    await check_works_again(host, after, sandbox)


@pytest.mark.parametrize("place", DOS, ids=str)
async def test_a_sandbox_that_is_destroyed_at_any_place(host: Host, place: Place) -> None:
    """It wins over the taking; what was saved already becomes ready without it."""
    lifecycle, sandbox, begun = await held_at(host, place)
    if place.kind == snapshot_take.KIND:
        await lifecycle.destroy(sandbox.id)
        lost = await settled(lifecycle, begun.id)
        assert (lost.state, lost.failure_code) == (SnapshotState.FAILED, "sandbox_destroyed")
        assert kept(host) == []
    else:
        await lifecycle.destroy(sandbox.id)
        await lifecycle.close()
        lifecycle = host.lifecycle()
        await lifecycle.recover()
        assert (await settled(lifecycle, begun.id)).state is SnapshotState.READY
        other = await lifecycle.start_create("other", SandboxSpec(), snapshot_id=begun.id)
        row = await lifecycle.wait_settled(other.id, 30)
        assert row is not None
        assert row.state is SandboxState.RUNNING, row.failure_message
        await lifecycle.destroy(other.id)
    await lifecycle.snapshots.delete(begun.id)
    assert host.held() == []
    assert kept(host) == []
    assert snapshots(host) == []


@pytest.mark.parametrize("place", BAKING, ids=str)
async def test_one_that_is_deleted_at_any_place_of_its_baking(host: Host, place: Place) -> None:
    lifecycle, sandbox, begun = await held_at(host, place)
    await lifecycle.snapshots.delete(begun.id)
    assert snapshots(host) == []
    assert kept(host) == []
    check_runs_on(host, sandbox)


@pytest.mark.parametrize("place", TAKING, ids=str)
async def test_every_do_and_undo_may_run_twice(host: Host, place: Place) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    errors = [HostError("broken on purpose", code="on_purpose")]

    async def fail(reached: Place) -> None:
        if reached == place and errors:
            raise errors.pop()

    disturb(lifecycle, fail, times=2)
    failed = await settled(lifecycle, (await lifecycle.snapshots.take(sandbox.id, "one")).id)
    assert failed.state is SnapshotState.FAILED
    assert kept(host) == []
    check_runs_on(host, sandbox)
    await check_works_again(host, lifecycle, sandbox)


async def test_a_fork_that_a_manager_left_undone_leaves_nothing(host: Host) -> None:
    """The snapshot was ready, and nobody began a sandbox from it any more."""
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    taken = await lifecycle.snapshots.take(sandbox.id, "for-forks", purpose=SnapshotPurpose.FORK)
    with lifecycle.snapshots.holding(taken.id):
        assert (await settled(lifecycle, taken.id)).state is SnapshotState.READY
        await lifecycle.snapshots.drop_unneeded()
        assert [each.id for each in snapshots(host)] == [taken.id], "somebody is about to use it"
        await lifecycle.close()
    after = host.lifecycle()
    await after.recover()
    await after.snapshots.drop_unneeded()
    assert snapshots(host) == []
    assert kept(host) == []
    check_runs_on(host, sandbox)


@pytest.mark.parametrize("way", ["pause", "stop"])
async def test_a_disk_of_many_snapshots_is_made_of_few_files_again(host: Host, way: str) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    names = iter(range(100))

    async def take() -> Snapshot:
        return await settled(lifecycle, (await lifecycle.snapshots.take(sandbox.id, f"s{next(names)}")).id)

    while (last := await take()).state is SnapshotState.READY:
        assert len(host.storage.volumes[sandbox.id].backing) < 8
    assert last.failure_code == "disk_chain_too_long"
    there, back = {
        "pause": (lifecycle.pause, lifecycle.resume),
        "stop": (lifecycle.stop, lifecycle.start),
    }[way]
    for change in (there, back):
        await change(sandbox.id)
        row = await lifecycle.wait_settled(sandbox.id, 30)
        assert row is not None and row.failure_code == "", row
    assert len(host.storage.volumes[sandbox.id].backing) == 1
    assert (await take()).state is SnapshotState.READY
