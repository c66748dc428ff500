"""What is read of snapshots in the background, and what becomes of one that is damaged, on fakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.lifecycle.conftest import Host

from atelier.db.snapshots import SnapshotRepository
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.lifecycle.snapshot_files import SnapshotFiles
from atelier.model.errors import ConflictError
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.snapshot import Snapshot, SnapshotState
from atelier.model.states import SandboxState


def flip_memory(host: Host, snapshot: Snapshot) -> None:
    memory = SnapshotFiles(host.data).image(snapshot.id).memory
    content = bytearray(memory.read_bytes())
    content[len(content) // 2] ^= 1
    memory.chmod(0o600)
    memory.write_bytes(content)


def flip_disk(host: Host, snapshot: Snapshot) -> None:
    host.storage.damaged_snapshots.add(snapshot.id)


def lose_disk(host: Host, snapshot: Snapshot) -> None:
    host.storage.snapshots.pop(snapshot.id)


DAMAGES = (flip_memory, flip_disk, lose_disk)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the snapshots of which files are read."""
    seen: list[str] = []
    check = SnapshotFiles.check

    async def noting(self: SnapshotFiles, snapshot_id: str, checksums: dict[str, str], *names: str) -> None:
        seen.append(snapshot_id)
        await check(self, snapshot_id, checksums, *names)

    monkeypatch.setattr(SnapshotFiles, "check", noting)
    return seen


async def taken(lifecycle: SandboxLifecycle, sandbox_id: str, name: str) -> Snapshot:
    begun = await lifecycle.snapshots.take(sandbox_id, name)
    found = await lifecycle.snapshots.wait_settled(begun.id, 30)
    assert found is not None
    assert found.state is SnapshotState.READY, found.failure_message
    return found


async def restored(lifecycle: SandboxLifecycle, name: str, snapshot: Snapshot) -> Sandbox:
    """Settled, well or not."""
    begun = await lifecycle.start_create(name, SandboxSpec(), snapshot_id=snapshot.id)
    found = await lifecycle.wait_settled(begun.id, 30)
    assert found is not None
    return found


def states(host: Host) -> dict[str, str]:
    with host.database.read() as connection:
        return {each.name: each.state.value for each in SnapshotRepository().list_in(connection)}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_each_is_read_once_after_a_boot_of_the_host_one_at_a_time(
    host: Host, read: list[str], damage: Callable[[Host, Snapshot], None]
) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    made = [await taken(lifecycle, sandbox.id, name) for name in ("one", "two", "three")]
    await lifecycle.snapshot_checks.check_next()
    assert read == [], "they were whole when they were written, in this boot"
    host.vmm.reboot()
    damage(host, made[1])
    for count in range(1, 4):
        await lifecycle.snapshot_checks.check_next()
        assert read == [each.id for each in made[:count]]
    assert states(host) == {"one": "ready", "two": "damaged", "three": "ready"}
    await lifecycle.close()
    after = host.lifecycle()
    await after.recover()
    read.clear()
    for _ in made:
        await after.snapshot_checks.check_next()
    assert read == [], "another manager in the same boot reads none again"


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_large_is_read_before_the_first_use_after_a_boot(
    host: Host, damage: Callable[[Host, Snapshot], None]
) -> None:
    lifecycle = host.lifecycle()
    sandbox = await host.created(lifecycle)
    damaged, whole = [await taken(lifecycle, sandbox.id, name) for name in ("damaged", "whole")]
    damage(host, damaged)
    host.vmm.reboot()
    lost = await restored(lifecycle, "lost", damaged)
    assert lost.state is SandboxState.FAILED
    assert lost.failure_code in ("snapshot_damaged", "disk_file_damaged", "snapshot_disk_not_found")
    assert states(host) == {"damaged": "damaged", "whole": "ready"}
    with pytest.raises(ConflictError) as refused:
        await lifecycle.start_create("again", SandboxSpec(), snapshot_id=damaged.id)
    assert refused.value.code == "snapshot_not_ready"
    assert (await restored(lifecycle, "other", whole)).state is SandboxState.RUNNING
