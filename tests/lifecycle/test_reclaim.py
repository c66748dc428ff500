"""What has no owner: found at the start and by the loop, freed; but volumes are kept until a person says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.lifecycle.conftest import Host

from atelier.db.engine import Connection
from atelier.db.sandboxes import SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.model.errors import ConflictError, HostError, NotFoundError
from atelier.model.machine import BootFiles, Disk, DiskFile, MachineSpec, NetworkAttachment, VolumeRequest
from atelier.model.orphan import OrphanKind

ORPHAN = "orphanaaaaaa"
NOWHERE = Path("/nonexistent")


async def leave_behind(host: Host, sandbox_id: str = ORPHAN) -> None:
    """All that a sandbox holds, without a row."""
    directory = host.run.vmm_directory(sandbox_id)
    await host.network.ensure_slot(sandbox_id, 0)
    await host.storage.ensure_volume(VolumeRequest(sandbox_id, DiskFile(NOWHERE, "raw"), 4096))
    await host.vmm.ensure_run_directory(sandbox_id, directory)
    await host.guests.ensure_channel(sandbox_id, host.vmm.guest_endpoint(directory), "token")
    disk = Disk("serial", DiskFile(NOWHERE, "raw"))
    boot = BootFiles(NOWHERE, NOWHERE, NOWHERE, "", "")
    await host.vmm.ensure_started(
        MachineSpec(sandbox_id, "abcd", 1, 128, boot, disk, disk, NetworkAttachment("none"), directory)
    )
    host.data.consoles.mkdir(parents=True, exist_ok=True)
    (host.data.consoles / f"{sandbox_id}.log").write_text("console")


async def test_all_but_the_volume_is_freed_in_order(host: Host) -> None:
    lifecycle = host.lifecycle()
    owned = await host.created(lifecycle)
    held = host.held_by(owned.id)
    await leave_behind(host)
    host.calls.clear()
    await lifecycle.recover()
    assert host.held_by(ORPHAN) == {"volume"}
    assert host.held_by(owned.id) == held
    assert not (host.data.consoles / f"{ORPHAN}.log").exists()
    frees = [call for call in host.calls if call.endswith("_absent") or call == "ensure_stopped"]
    assert frees == ["ensure_stopped", "ensure_channel_absent", "ensure_run_directory_absent", "ensure_slot_absent"]
    assert await lifecycle.reclaim.free_orphans() == []


async def test_volumes_go_when_a_person_says_so_and_no_others(host: Host) -> None:
    lifecycle = host.lifecycle()
    owned = await host.created(lifecycle)
    await leave_behind(host)
    await leave_behind(host, "othergbbbbbb")
    await lifecycle.reconcile()
    listed = await lifecycle.reclaim.orphans.list()
    assert [(each.id, each.used_bytes > 0) for each in listed] == [
        ("orphanaaaaaa", True),
        ("othergbbbbbb", True),
    ]
    with pytest.raises(ConflictError) as owner:
        await lifecycle.reclaim.orphans.remove(OrphanKind.VOLUME, owned.id)
    assert owner.value.code == "not_an_orphan"
    with pytest.raises(NotFoundError):
        await lifecycle.reclaim.orphans.remove(OrphanKind.VOLUME, "nosuchvolume")
    await lifecycle.reclaim.orphans.remove(OrphanKind.VOLUME, ORPHAN)
    assert set(host.storage.volumes) == {owned.id, "othergbbbbbb"}
    assert [each.id for each in await lifecycle.reclaim.orphans.list()] == ["othergbbbbbb"]


async def test_memories_and_snapshots_go_when_a_person_says_so_and_no_others(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the restore of an older backup: neither the sandbox nor its snapshot is known any more."""
    lifecycle = host.lifecycle()
    kept, lost = [await host.created(lifecycle, name) for name in ("kept", "lost")]
    snapshots: list[str] = []
    for each in (kept, lost):
        snapshots.append((await lifecycle.snapshots.take(each.id, each.name)).id)
        await lifecycle.snapshots.wait_settled(snapshots[-1], 30)
        await lifecycle.pause(each.id)
        await lifecycle.wait_settled(each.id, 30)
    assert await lifecycle.reclaim.orphans.list() == []

    def forget(connection: Connection) -> None:
        SandboxRepository().delete(connection, lost.id)
        SnapshotRepository().delete(connection, snapshots[1])

    await host.database.write(forget)
    await lifecycle.reconcile()
    await lifecycle.reclaim.orphans.tell()
    assert caplog.text.count("1 volumes, 1 memories, 1 snapshots") == 1
    listed = await lifecycle.reclaim.orphans.list()
    expected = {OrphanKind.VOLUME: lost.id, OrphanKind.MEMORY: lost.id, OrphanKind.SNAPSHOT: snapshots[1]}
    assert {each.kind: each.id for each in listed} == expected
    assert all(each.used_bytes > 0 for each in listed)
    for kind, owned in ((OrphanKind.MEMORY, kept.id), (OrphanKind.SNAPSHOT, snapshots[0])):
        with pytest.raises(ConflictError) as refused:
            await lifecycle.reclaim.orphans.remove(kind, owned)
        assert refused.value.code == "not_an_orphan"
        with pytest.raises(NotFoundError) as absent:
            await lifecycle.reclaim.orphans.remove(kind, "../../others")
        assert absent.value.code == "orphan_not_found"
    for each in listed:
        await lifecycle.reclaim.orphans.remove(each.kind, each.id)
        expected.pop(each.kind)
        assert {each.kind: each.id for each in await lifecycle.reclaim.orphans.list()} == expected
    assert list(host.storage.snapshots) == snapshots[:1]
    assert [path.name for path in host.data.snapshots.iterdir()] == snapshots[:1]
    assert {path.name.partition(".")[0] for path in host.data.paused.iterdir()} == {kept.id}


async def test_what_cannot_be_freed_now_keeps_nobody_waiting(host: Host) -> None:
    lifecycle = host.lifecycle()
    await leave_behind(host)
    await leave_behind(host, "othergbbbbbb")
    host.faults.fail_next("ensure_stopped", HostError("hangs in the kernel"))
    assert await lifecycle.reclaim.free_orphans() == ["othergbbbbbb"]
    assert host.held_by(ORPHAN) == {"vmm", "run", "channel", "slot", "volume"}
    assert await lifecycle.reclaim.free_orphans() == [ORPHAN]


async def test_drivers_that_cannot_list_do_not_stop_a_start(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    await lifecycle.close()
    host.faults.fail_next("list_channels", HostError("gateway is down"))
    again = host.lifecycle()
    await again.recover()
    row = host.row(sandbox.id)
    assert row is not None
    assert row.state == "running"


async def test_what_is_being_made_is_nobodys_orphan(host: Host) -> None:
    lifecycle = host.lifecycle()
    host.hang("initialize")
    creating = await host.begun(lifecycle)
    await host.reach("initialize")
    assert await lifecycle.reclaim.free_orphans() == []
    host.faults.release("initialize")
    await lifecycle.wait_settled(creating.id, 30)
    assert host.held_by(creating.id) == {"vmm", "run", "channel", "slot", "volume"}
