"""What every storage driver keeps to where a sandbox's volume is frozen and its snapshots become disks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.contract.storage_kinds import BASE_MIB, KINDS, LASTING, STACKING, files_below, make_storage

from atelier.drivers.storage.fake import FakeStorage
from atelier.drivers.storage.interface import StorageDriver
from atelier.model.errors import ConflictError, HostError, InvalidRequestError, NotFoundError
from atelier.model.machine import ROOT_DISK_SERIAL, Disk, DiskFile, SnapshotDisk, VolumeRequest

SANDBOX, CHILD = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
FIRST, SECOND = "ssssssssssss", "tttttttttttt"


@pytest.fixture
def base(tmp_path: Path) -> DiskFile:
    path = tmp_path / "base.img"
    with path.open("wb") as file:
        file.write(b"the base's first bytes")
        file.truncate(BASE_MIB * 1024 * 1024)
    path.chmod(0o444)
    return DiskFile(path, "raw")


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> StorageDriver:
    return make_storage(request.param, tmp_path / "volumes")


@pytest.fixture(params=STACKING)
def stacking(request: pytest.FixtureRequest, tmp_path: Path) -> StorageDriver:
    return make_storage(request.param, tmp_path / "volumes")


async def freeze(storage: StorageDriver, sandbox_id: str, snapshot_id: str) -> None:
    await storage.begin_layer(sandbox_id, snapshot_id)
    await storage.freeze_layer(sandbox_id, snapshot_id)
    await storage.freeze_layer(sandbox_id, snapshot_id)
    await storage.end_layer(sandbox_id, snapshot_id, switched=True)


async def snapshot(storage: StorageDriver, sandbox_id: str, snapshot_id: str) -> SnapshotDisk:
    await freeze(storage, sandbox_id, snapshot_id)
    return await storage.ensure_snapshot_disk(snapshot_id, sandbox_id)


async def found(storage: StorageDriver, sandbox_id: str) -> Disk:
    disk = await storage.find_volume(sandbox_id)
    assert disk is not None
    return disk


async def test_a_frozen_volume_has_one_file_more(stacking: StorageDriver, base: DiskFile) -> None:
    before = await stacking.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    next_top = await stacking.begin_layer(SANDBOX, FIRST)
    assert next_top.format == "qcow2"
    assert next_top.path != before.top.path
    assert await stacking.begin_layer(SANDBOX, FIRST) == next_top
    assert await stacking.find_volume(SANDBOX) == before, "the volume is what it was until the VMM is switched"
    await stacking.end_layer(SANDBOX, FIRST, switched=True)
    after = await found(stacking, SANDBOX)
    assert after.top == before.top
    assert after.backing[1:] == before.backing
    assert SANDBOX in after.backing[0].path.name
    await stacking.end_layer(SANDBOX, FIRST, switched=True)
    await stacking.end_layer(SANDBOX, FIRST, switched=False)
    assert await stacking.find_volume(SANDBOX) == after
    assert await stacking.list_volumes() == [SANDBOX]


async def test_freezing_that_is_given_up_leaves_all_as_it_was(storage: StorageDriver, base: DiskFile) -> None:
    before = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await storage.end_layer(SANDBOX, FIRST, switched=False)
    await storage.begin_layer(SANDBOX, FIRST)
    await storage.end_layer(SANDBOX, FIRST, switched=False)
    await storage.end_layer(SANDBOX, FIRST, switched=True)
    assert await storage.find_volume(SANDBOX) == before
    assert await storage.list_snapshot_disks() == []
    with pytest.raises(NotFoundError) as refusal:
        await storage.ensure_snapshot_disk(FIRST, SANDBOX)
    assert refusal.value.code == "layer_not_found"
    await storage.grow_volume(SANDBOX, 96)
    assert (await snapshot(storage, SANDBOX, FIRST)).disk.read_only


async def test_one_snapshot_at_a_time_freezes_a_volume(storage: StorageDriver, base: DiskFile) -> None:
    with pytest.raises(NotFoundError) as absent:
        await storage.begin_layer(SANDBOX, FIRST)
    assert absent.value.code == "volume_not_found"
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await storage.begin_layer(SANDBOX, FIRST)
    for refused in (
        storage.begin_layer(SANDBOX, SECOND),
        storage.grow_volume(SANDBOX, 96),
        storage.shorten_volume(SANDBOX),
        storage.ensure_snapshot_disk(FIRST, SANDBOX),
    ):
        with pytest.raises(ConflictError) as refusal:
            await refused
        assert refusal.value.code == "layer_under_way"
    await storage.end_layer(SANDBOX, SECOND, switched=True)
    await storage.end_layer(SANDBOX, FIRST, switched=True)
    await freeze(storage, SANDBOX, SECOND)


async def test_a_snapshot_becomes_a_disk_of_its_own(storage: StorageDriver, base: DiskFile) -> None:
    volume = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    assert await storage.find_snapshot_disk(FIRST) is None
    await freeze(storage, SANDBOX, FIRST)
    assert await storage.find_snapshot_disk(FIRST) is None
    assert await storage.snapshot_used_bytes(FIRST) == 0
    assert await storage.list_snapshot_disks() == [FIRST], "what holds a layer can be found"
    made = await storage.ensure_snapshot_disk(FIRST, SANDBOX)
    assert made.disk.serial == ROOT_DISK_SERIAL
    assert made.disk.read_only
    assert made.disk.backing == volume.backing, "the layer is in it, not below it"
    assert await storage.snapshot_used_bytes(FIRST) == made.used_bytes > 0
    assert len(bytes.fromhex(made.checksum)) == 32
    assert await storage.ensure_snapshot_disk(FIRST, SANDBOX) == made
    assert await storage.find_snapshot_disk(FIRST) == made.disk
    await storage.verify_snapshot_disk(FIRST)
    with pytest.raises(ConflictError) as taken:
        await storage.begin_layer(SANDBOX, FIRST)
    assert taken.value.code == "snapshot_exists"
    await storage.ensure_snapshot_disk_absent(FIRST)
    await storage.ensure_snapshot_disk_absent(FIRST)
    assert await storage.find_snapshot_disk(FIRST) is None
    assert await storage.snapshot_used_bytes(FIRST) == 0
    assert await storage.list_snapshot_disks() == []
    with pytest.raises(NotFoundError):
        await storage.verify_snapshot_disk(FIRST)


async def test_a_snapshot_outlives_its_sandbox_at_every_stage(storage: StorageDriver, base: DiskFile) -> None:
    for stage in range(3):
        await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
        if stage > 0:
            await freeze(storage, SANDBOX, SECOND)
        await freeze(storage, SANDBOX, FIRST)
        if stage == 2:
            await storage.ensure_snapshot_disk(FIRST, SANDBOX)
        await storage.ensure_volume_absent(SANDBOX)
        made = await storage.ensure_snapshot_disk(FIRST, SANDBOX)
        assert len(made.disk.backing) == files_below(storage, 1)
        await storage.verify_snapshot_disk(FIRST)
        await storage.ensure_snapshot_disk_absent(FIRST)
        await storage.ensure_snapshot_disk_absent(SECOND)
        assert await storage.list_snapshot_disks() == []


async def test_destroying_in_the_middle_of_freezing(storage: StorageDriver, base: DiskFile) -> None:
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await storage.begin_layer(SANDBOX, FIRST)
    await storage.ensure_volume_absent(SANDBOX)
    await storage.end_layer(SANDBOX, FIRST, switched=True)
    await storage.end_layer(SANDBOX, FIRST, switched=False)
    await storage.ensure_snapshot_disk_absent(FIRST)
    assert await storage.list_volumes() == []
    assert await storage.list_snapshot_disks() == []
    assert await storage.used_bytes(SANDBOX) == 0


async def test_a_snapshot_that_is_given_up_before_its_volume_is_frozen(storage: StorageDriver, base: DiskFile) -> None:
    """As when the one undo runs before the other: the volume goes on over its layer, and nothing holds that."""
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await storage.begin_layer(SANDBOX, FIRST)
    assert await storage.list_snapshot_disks() == [FIRST]
    await storage.ensure_snapshot_disk_absent(FIRST)
    await storage.end_layer(SANDBOX, FIRST, switched=True)
    assert len((await found(storage, SANDBOX)).backing) == files_below(storage, 2)
    assert await storage.list_snapshot_disks() == []
    with pytest.raises(NotFoundError):
        await storage.ensure_snapshot_disk(FIRST, SANDBOX)
    await storage.shorten_volume(SANDBOX)
    assert len((await found(storage, SANDBOX)).backing) == files_below(storage, 1)


async def test_another_attempt_for_the_same_snapshot(stacking: StorageDriver, base: DiskFile) -> None:
    await stacking.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await freeze(stacking, SANDBOX, FIRST)
    await freeze(stacking, SANDBOX, FIRST)
    disk = await found(stacking, SANDBOX)
    assert len({disk.top.path, *(file.path for file in disk.backing)}) == 4
    made = await stacking.ensure_snapshot_disk(FIRST, SANDBOX)
    assert made.disk.backing == disk.backing[2:]


async def test_volumes_over_a_snapshot(storage: StorageDriver, base: DiskFile) -> None:
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    made = await snapshot(storage, SANDBOX, FIRST)
    with pytest.raises(InvalidRequestError) as small:
        await storage.ensure_volume(VolumeRequest(CHILD, made.disk.top, 63))
    assert small.value.code == "disk_too_small"
    child = await storage.ensure_volume(VolumeRequest(CHILD, made.disk.top, 64))
    assert len(child.backing) == files_below(storage, 2)
    assert child.backing[1:] == made.disk.backing
    assert await storage.ensure_volume(VolumeRequest(CHILD, made.disk.top, 64)) == child
    assert await storage.find_volume(CHILD) == child
    await storage.ensure_snapshot_disk_absent(FIRST)
    await storage.ensure_volume_absent(SANDBOX)
    assert await storage.find_volume(CHILD) == child, "a volume keeps what it stands over"
    with pytest.raises(HostError) as gone:
        await storage.ensure_volume(VolumeRequest(SANDBOX, made.disk.top, 64))
    assert gone.value.code == "disk_file_missing"
    await storage.ensure_volume_absent(CHILD)


async def test_chains_stay_short(stacking: StorageDriver, base: DiskFile) -> None:
    await stacking.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    names = [f"{letter * 12}" for letter in "cdefghij"]
    for name in names[:6]:
        await freeze(stacking, SANDBOX, name)
    assert len((await found(stacking, SANDBOX)).backing) + 1 == 8
    with pytest.raises(ConflictError) as full:
        await stacking.begin_layer(SANDBOX, names[6])
    assert full.value.code == "disk_chain_too_long"
    await stacking.shorten_volume(SANDBOX)
    short = await found(stacking, SANDBOX)
    assert len(short.backing) == 1
    await stacking.shorten_volume(SANDBOX)
    assert await stacking.find_volume(SANDBOX) == short
    await freeze(stacking, SANDBOX, names[6])
    for name in names[:7]:
        made = await stacking.ensure_snapshot_disk(name, SANDBOX)
        assert made.disk.backing == short.backing
    with pytest.raises(NotFoundError):
        await stacking.shorten_volume(CHILD)


async def test_snapshots_of_snapshots_stay_short(stacking: StorageDriver, base: DiskFile) -> None:
    source, lengths = base, list[int]()
    for sandbox_id, snapshot_id in zip("cdefghi", "nopqrst", strict=True):
        await stacking.ensure_volume(VolumeRequest(sandbox_id * 12, source, 64))
        made = await snapshot(stacking, sandbox_id * 12, snapshot_id * 12)
        await stacking.ensure_volume_absent(sandbox_id * 12)
        source = made.disk.top
        lengths.append(1 + len(made.disk.backing))
    assert lengths == [2, 3, 4, 2, 3, 4, 2]


@pytest.mark.parametrize("kind", LASTING)
async def test_snapshots_outlive_the_driver(kind: str, base: DiskFile, tmp_path: Path) -> None:
    volumes = tmp_path / "volumes"
    first = make_storage(kind, volumes)
    await first.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    made = await snapshot(first, SANDBOX, FIRST)
    await first.begin_layer(SANDBOX, SECOND)
    again = make_storage(kind, volumes)
    assert await again.find_snapshot_disk(FIRST) == made.disk
    assert await again.ensure_snapshot_disk(FIRST, SANDBOX) == made
    with pytest.raises(ConflictError):
        await again.ensure_snapshot_disk(SECOND, SANDBOX)
    await again.end_layer(SANDBOX, SECOND, switched=True)
    third = make_storage(kind, volumes)
    assert await third.find_volume(SANDBOX) == await again.find_volume(SANDBOX)
    assert await third.list_snapshot_disks() == [FIRST, SECOND]
    assert (await third.ensure_snapshot_disk(SECOND, SANDBOX)).disk.backing == made.disk.backing
    for snapshot_id in (FIRST, SECOND):
        await third.ensure_snapshot_disk_absent(snapshot_id)
    assert await make_storage(kind, volumes).list_snapshot_disks() == []


async def test_what_is_no_id_is_refused(storage: StorageDriver, base: DiskFile) -> None:
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    for name in ("../escape", "", "aaaaaaaaaaaa.qcow2", "AAAAAAAAAAAA"):
        for refused in (
            storage.begin_layer(SANDBOX, name),
            storage.begin_layer(name, FIRST),
            storage.end_layer(SANDBOX, name, switched=True),
            storage.end_layer(name, FIRST, switched=True),
            storage.ensure_snapshot_disk(name, SANDBOX),
            storage.ensure_snapshot_disk(FIRST, name),
            storage.find_snapshot_disk(name),
            storage.verify_snapshot_disk(name),
            storage.ensure_snapshot_disk_absent(name),
            storage.shorten_volume(name),
        ):
            with pytest.raises(InvalidRequestError) as refusal:
                await refused
            assert refusal.value.code == "invalid_id"


async def test_the_fake_tells_of_a_damaged_snapshot(base: DiskFile) -> None:
    storage = FakeStorage()
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await snapshot(storage, SANDBOX, FIRST)
    storage.damaged_snapshots.add(FIRST)
    with pytest.raises(HostError) as damage:
        await storage.verify_snapshot_disk(FIRST)
    assert damage.value.code == "disk_file_damaged"


# --- disks that go from one installation to another -----------------------------------------------------------------------


async def exported(storage: StorageDriver, base: DiskFile, target: Path) -> str:
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await snapshot(storage, SANDBOX, FIRST)
    return await storage.export_snapshot_disk(FIRST, target)


@pytest.fixture(params=KINDS)
def two_storages(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StorageDriver, StorageDriver]:
    return make_storage(request.param, tmp_path / "volumes"), make_storage(request.param, tmp_path / "others")


async def test_an_exported_disk_serves_another_installation(
    two_storages: tuple[StorageDriver, StorageDriver], base: DiskFile, tmp_path: Path
) -> None:
    here, there = two_storages
    target = tmp_path / "exported"
    checksum = await exported(here, base, target)
    assert not target.stat().st_mode & 0o222
    made = await there.import_snapshot_disk(SECOND, target, base, checksum)
    assert await there.import_snapshot_disk(SECOND, tmp_path / "gone", base, checksum) == made, "twice is once"
    await there.verify_snapshot_disk(SECOND)
    assert len(made.disk.backing) == files_below(there, 1)
    # Nothing of it hangs on the other installation.
    await here.ensure_volume_absent(SANDBOX)
    await here.ensure_snapshot_disk_absent(FIRST)
    target.unlink()
    volume = await there.ensure_volume(VolumeRequest(CHILD, made.disk.top, 64))
    assert len(volume.backing) == files_below(there, 2)
    assert await there.list_snapshot_disks() == [SECOND]
    await there.ensure_snapshot_disk_absent(SECOND)
    assert len((await found(there, CHILD)).backing) == files_below(there, 2), "as with any snapshot"


async def test_a_disk_that_is_not_what_was_exported_is_not_taken(
    two_storages: tuple[StorageDriver, StorageDriver], base: DiskFile, tmp_path: Path
) -> None:
    here, there = two_storages
    target = tmp_path / "exported"
    checksum = await exported(here, base, target)
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.unlink()
    target.write_bytes(content)
    with pytest.raises(HostError) as damaged:
        await there.import_snapshot_disk(SECOND, target, base, checksum)
    assert damaged.value.code == "disk_file_damaged"
    with pytest.raises(HostError) as missing:
        await there.import_snapshot_disk(SECOND, tmp_path / "gone", base, checksum)
    assert missing.value.code == "disk_file_missing"
    assert await there.find_snapshot_disk(SECOND) is None
    await there.ensure_snapshot_disk_absent(SECOND)
    assert await there.list_snapshot_disks() == []


async def test_only_a_disk_over_an_image_can_be_exported(
    stacking: StorageDriver, base: DiskFile, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError) as absent:
        await stacking.export_snapshot_disk(FIRST, tmp_path / "exported")
    assert absent.value.code == "snapshot_disk_not_found"
    await stacking.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    first = await snapshot(stacking, SANDBOX, FIRST)
    await stacking.ensure_volume(VolumeRequest(CHILD, first.disk.top, 64))
    await snapshot(stacking, CHILD, SECOND)
    with pytest.raises(ConflictError) as over_another:
        await stacking.export_snapshot_disk(SECOND, tmp_path / "exported")
    assert over_another.value.code == "snapshot_disk_not_alone"
    assert not (tmp_path / "exported").exists()
