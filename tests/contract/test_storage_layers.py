"""Layers and snapshot disks as qcow2 files: what is in them, what stays and goes, what is refused, and what a full disk
leaves."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.qcow2_disks import IMAGE_NAME, content_of, files_in, find_volume, freeze, holds, make_image, qemu_io, write
from tests.real_machines import missing_programs

from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.model.errors import ConflictError, DiskFullError, HostError
from atelier.model.layout import DiskLayout
from atelier.model.machine import DiskFile, SnapshotDisk, VolumeRequest

NO_QEMU_IMG = missing_programs("qemu-img", "qemu-io")
pytestmark = pytest.mark.skipif(bool(NO_QEMU_IMG), reason=NO_QEMU_IMG)

SANDBOX, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
FIRST, SECOND = "ssssssssssss", "tttttttttttt"


@pytest.fixture
def layout(tmp_path: Path) -> DiskLayout:
    return DiskLayout(tmp_path / "volumes")


@pytest.fixture
def storage(layout: DiskLayout) -> Qcow2Storage:
    return Qcow2Storage(layout.root)


@pytest.fixture
def base(tmp_path: Path) -> DiskFile:
    return make_image(tmp_path / "cache")


async def test_a_snapshot_has_what_was_written_before_and_nothing_after(
    storage: Qcow2Storage, base: DiskFile, layout: DiskLayout
) -> None:
    volume = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    write(volume.top.path, 2, at_mib=1)
    next_top = await storage.begin_layer(SANDBOX, FIRST)
    write(volume.top.path, 3, at_mib=2)  # until the switch the guest writes where it wrote
    write(next_top.path, 4, at_mib=3)
    write(next_top.path, 4, at_mib=1)
    await storage.end_layer(SANDBOX, FIRST, switched=True)
    write(volume.top.path, 5, at_mib=4)
    made = await storage.ensure_snapshot_disk(FIRST, SANDBOX)
    write(volume.top.path, 6, at_mib=5)
    assert holds(made.disk.top.path, 1, 2, 3, 1, 1, 1, 1, 1, 0)
    assert holds(volume.top.path, 1, 4, 3, 4, 5, 6, 1, 1, 0)
    subprocess.run(["qemu-img", "check", "-q", str(made.disk.top.path)], check=True)

    layer = (await find_volume(storage, SANDBOX)).backing[0].path
    assert made.disk.top.path.stat().st_ino != layer.stat().st_ino, "the parent's VMM may still write to the layer"
    assert made.disk.top.path.stat().st_mode & 0o777 == 0o400
    assert layer.stat().st_mode & 0o777 == 0o400
    assert layout.snapshots.stat().st_mode & 0o777 == 0o700
    assert layer.stat().st_nlink == 1, "no hold is left on the layer"
    summed = subprocess.check_output(["sha256sum", str(made.disk.top.path)], text=True).split()[0]
    assert made.checksum == summed


async def test_twenty_volumes_over_one_snapshot_do_not_see_each_other(storage: Qcow2Storage, base: DiskFile) -> None:
    volume = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    write(volume.top.path, 2, at_mib=1)
    await freeze(storage, SANDBOX, FIRST)
    snapshot = (await storage.ensure_snapshot_disk(FIRST, SANDBOX)).disk.top
    ids = [letter * 12 for letter in "abcdefghijklmnopqrstu"[1:]]
    disks = await asyncio.gather(*(storage.ensure_volume(VolumeRequest(each, snapshot, 64)) for each in ids))
    assert len(disks) == 20
    for number, disk in enumerate(disks):
        write(disk.top.path, 100 + number, at_mib=2)
    for number, disk in enumerate(disks):
        assert holds(disk.top.path, 1, 2, 100 + number, 1)
    assert await storage.used_bytes(ids[0]) < 2 * 2**20
    await storage.verify_snapshot_disk(FIRST)
    await storage.ensure_snapshot_disk_absent(FIRST)
    await storage.ensure_volume_absent(SANDBOX)
    await asyncio.gather(*(storage.ensure_volume_absent(each) for each in ids[1:]))
    assert holds(disks[0].top.path, 1, 2, 100, 1)
    assert await storage.used_bytes(ids[0]) > 2 * 2**20, "the snapshot's disk is this sandbox's alone now"


async def test_all_goes_with_the_last_that_needs_it(
    storage: Qcow2Storage, base: DiskFile, layout: DiskLayout, tmp_path: Path
) -> None:
    """Sandbox, snapshot, sandbox over it, snapshot of that, sandbox over it; the elder always go first."""
    source = base
    for number, (sandbox_id, snapshot_id) in enumerate(zip("cde", "nop", strict=True)):
        volume = await storage.ensure_volume(VolumeRequest(sandbox_id * 12, source, 64))
        write(volume.top.path, 10 + number, at_mib=number)
        await freeze(storage, sandbox_id * 12, snapshot_id * 12)
        source = (await storage.ensure_snapshot_disk(snapshot_id * 12, sandbox_id * 12)).disk.top
        base.path.unlink(missing_ok=True)
        await storage.ensure_volume_absent(sandbox_id * 12)
        if number:
            await storage.ensure_snapshot_disk_absent("nop"[number - 1] * 12)
    assert await storage.list_snapshot_disks() == ["p" * 12]
    last = await storage.ensure_volume(VolumeRequest(SANDBOX, source, 64))
    await storage.ensure_snapshot_disk_absent("p" * 12)
    assert holds(last.top.path, 10, 11, 12, 1)
    assert sorted(path.name for path in layout.origins.iterdir()) == ["nnnnnnnnnnnn.qcow2", "oooooooooooo.qcow2"]
    assert await Qcow2Storage(layout.root).find_volume(SANDBOX) == last
    await storage.ensure_volume_absent(SANDBOX)
    assert list(layout.root.iterdir()) == []


async def test_chains_are_merged_without_a_changed_byte(
    storage: Qcow2Storage, base: DiskFile, layout: DiskLayout, tmp_path: Path
) -> None:
    volume = (await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))).top.path
    for number, snapshot_id in enumerate("cdefgh"):
        write(volume, 20 + number, at_mib=number)
        write(volume, 30 + number, at_mib=40)
        # What was written reads as zeros again, over the image and beyond its end, and as garbage of the image never.
        qemu_io(volume, f"write -z -u {number}M 64k", f"discard {41 + number}M 1M")
        await freeze(storage, SANDBOX, snapshot_id * 12)
        if number == 2:
            await storage.grow_volume(SANDBOX, 96)
            write(volume, 7, at_mib=90)
    write(volume, 9, at_mib=50)
    before = content_of(volume)
    used = await storage.used_bytes(SANDBOX)
    made = await storage.ensure_snapshot_disk("h" * 12, SANDBOX)
    expected = bytearray(before)
    expected[50 * 2**20 : 51 * 2**20] = bytes(2**20)
    assert content_of(made.disk.top.path) == bytes(expected)
    for snapshot_id in "cdefg":
        await storage.ensure_snapshot_disk_absent(snapshot_id * 12)
    await storage.shorten_volume(SANDBOX)
    assert content_of(volume) == before
    assert (await find_volume(storage, SANDBOX)).backing == (DiskFile(layout.bases / IMAGE_NAME, "raw"),)
    assert await storage.used_bytes(SANDBOX) < used
    assert not layout.layers.exists(), "nobody needs the layers any more"
    assert volume.stat().st_mode & 0o777 == 0o600
    subprocess.run(["qemu-img", "check", "-q", str(volume)], check=True)


async def test_merging_keeps_what_a_snapshot_without_a_disk_needs(storage: Qcow2Storage, base: DiskFile) -> None:
    volume = (await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))).top.path
    write(volume, 2, at_mib=1)
    await freeze(storage, SANDBOX, FIRST)
    write(volume, 3, at_mib=2)
    await freeze(storage, SANDBOX, SECOND)
    write(volume, 4, at_mib=3)
    await storage.shorten_volume(SANDBOX)
    await storage.ensure_volume_absent(SANDBOX)
    for snapshot_id, expected in ((SECOND, (1, 2, 3, 1)), (FIRST, (1, 2, 1, 1))):
        assert holds((await storage.ensure_snapshot_disk(snapshot_id, SANDBOX)).disk.top.path, *expected)


async def test_one_flipped_byte_is_found(storage: Qcow2Storage, base: DiskFile, layout: DiskLayout) -> None:
    volume = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    write(volume.top.path, 2, at_mib=1)
    await freeze(storage, SANDBOX, FIRST)
    path = (await storage.ensure_snapshot_disk(FIRST, SANDBOX)).disk.top.path
    path.chmod(0o600)
    for position in (5000, path.stat().st_size // 2, path.stat().st_size - 1):
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)
            for replacement in (bytes([byte[0] ^ 1]), byte):
                file.seek(position)
                file.write(replacement)
                file.flush()
                if replacement == byte:
                    await storage.verify_snapshot_disk(FIRST)
                    continue
                with pytest.raises(HostError) as damage:
                    await storage.verify_snapshot_disk(FIRST)
                assert damage.value.code == "disk_file_damaged"
                assert damage.value.hint
    layout.snapshot_checksum(FIRST).unlink()
    with pytest.raises(HostError):
        await storage.verify_snapshot_disk(FIRST)


async def test_a_file_that_is_written_to_is_not_thrown_away(storage: Qcow2Storage, base: DiskFile) -> None:
    volume = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    next_top = await storage.begin_layer(SANDBOX, FIRST)
    write(next_top.path, 2, at_mib=1)
    with pytest.raises(ConflictError) as refusal:
        await storage.end_layer(SANDBOX, FIRST, switched=False)
    assert refusal.value.code == "layer_in_use"
    await storage.end_layer(SANDBOX, FIRST, switched=True)
    assert holds(volume.top.path, 1, 2)


def tamper(path: Path, *, backing: Path | None = None, features: int | None = None) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    if backing is not None:
        words = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(backing), str(path)]
        subprocess.run(words, check=True)
    if features is not None:
        with path.open("r+b") as file:
            file.seek(72)
            file.write(features.to_bytes(8, "big"))
    path.chmod(mode & 0o777)


async def test_headers_that_were_tampered_with_reach_nobody_elses_data(
    storage: Qcow2Storage, base: DiskFile, layout: DiskLayout
) -> None:
    """As a VMM that was broken out of could write into its own volume and layers."""
    for sandbox_id, snapshot_id in ((SANDBOX, FIRST), (OTHER, SECOND)):
        volume = await storage.ensure_volume(VolumeRequest(sandbox_id, base, 64))
        write(volume.top.path, 2, at_mib=1)
        await freeze(storage, sandbox_id, snapshot_id)
    secret = (await storage.ensure_snapshot_disk(SECOND, OTHER)).disk
    child = await storage.ensure_volume(VolumeRequest("cccccccccccc", secret.top, 64))
    await freeze(storage, "cccccccccccc", "uuuuuuuuuuuu")
    grandchild = (await storage.ensure_snapshot_disk("uuuuuuuuuuuu", "cccccccccccc")).disk
    origin = grandchild.backing[0].path
    assert origin.parent == layout.origins
    own = await find_volume(storage, SANDBOX)
    for named in (
        secret.top.path,
        (await find_volume(storage, OTHER)).backing[0].path,
        child.backing[0].path,
        origin,
        layout.volume(OTHER),
        layout.snapshot_layer(FIRST),
        own.backing[0].path.parent / ".." / "layers" / own.backing[0].path.name,
    ):
        for place in (layout.volume(SANDBOX), own.backing[0].path):
            kept = place.read_bytes()
            tamper(place, backing=named)
            for refused in (storage.find_volume(SANDBOX), storage.shorten_volume(SANDBOX)):
                with pytest.raises(HostError) as refusal:
                    await refused
                assert refusal.value.code == "disk_file_damaged"
            if place != layout.volume(SANDBOX):
                with pytest.raises(HostError):
                    await storage.ensure_snapshot_disk(FIRST, SANDBOX)
            place.chmod(0o600)
            place.write_bytes(kept)
    # In a circle.
    tamper(own.backing[0].path, backing=own.backing[0].path)
    assert await storage.used_bytes(SANDBOX) > 0
    with pytest.raises(HostError) as circle:
        await storage.find_volume(SANDBOX)
    assert circle.value.code == "disk_file_damaged"

    path = grandchild.top.path
    tamper(path, backing=layout.layers / child.backing[0].path.name)
    with pytest.raises(HostError) as named_layer:
        await storage.find_snapshot_disk("uuuuuuuuuuuu")
    assert named_layer.value.code == "disk_file_damaged"


@pytest.mark.parametrize("features", [2, 4, 4096])
async def test_data_in_another_file_is_refused(storage: Qcow2Storage, base: DiskFile, features: int) -> None:
    """A program of ours that opens such a file would open the other one, too."""
    volume = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await freeze(storage, SANDBOX, FIRST)
    tamper((await find_volume(storage, SANDBOX)).backing[0].path, features=features)
    with pytest.raises(HostError) as refusal:
        await storage.ensure_snapshot_disk(FIRST, SANDBOX)
    assert refusal.value.code == "disk_file_damaged"
    tamper(volume.top.path, features=features)
    for refused in (storage.grow_volume(SANDBOX, 96), storage.find_volume(SANDBOX)):
        with pytest.raises(HostError) as refusal:
            await refused
        assert refusal.value.code == "disk_file_damaged"


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_is_said_and_leaves_nothing(small_file_system: Path, tmp_path: Path) -> None:
    small_base = tmp_path / IMAGE_NAME
    small_base.write_bytes(bytes(2**20))
    small_base.chmod(0o444)
    storage = Qcow2Storage(small_file_system / "volumes")
    volume = (await storage.ensure_volume(VolumeRequest(SANDBOX, DiskFile(small_base, "raw"), 64))).top.path
    for number in range(4):
        write(volume, 2, at_mib=number)
    await freeze(storage, SANDBOX, FIRST)
    for number in range(3, 7):
        write(volume, 3, at_mib=number)
    await freeze(storage, SANDBOX, SECOND)
    filler = small_file_system / "filler"
    # Full at once; while the second file is copied; while they are merged.
    for room_mib in (0, 5, 9):
        filler.write_bytes(bytes(max(0, await storage.free_bytes() - room_mib * 2**20)))
        before = files_in(small_file_system)
        with pytest.raises(DiskFullError) as refusal:
            await storage.ensure_snapshot_disk(SECOND, SANDBOX)
        assert refusal.value.hint
        with pytest.raises(DiskFullError):
            await storage.shorten_volume(SANDBOX)
        assert files_in(small_file_system) == before
        if room_mib == 0:
            with pytest.raises(DiskFullError):
                await storage.begin_layer(SANDBOX, "uuuuuuuuuuuu")
            await storage.end_layer(SANDBOX, "uuuuuuuuuuuu", switched=False)
            assert files_in(small_file_system) == before
        assert holds(volume, 2, 2, 2, 3, 3, 3, 3)
        filler.unlink()
    made = await storage.ensure_snapshot_disk(FIRST, SANDBOX)
    assert holds(made.disk.top.path, 2, 2, 2, 2)


async def test_a_copy_that_is_given_up_leaves_nothing(
    storage: Qcow2Storage, base: DiskFile, layout: DiskLayout
) -> None:
    volume = (await storage.ensure_volume(VolumeRequest(SANDBOX, base, 256))).top.path
    qemu_io(volume, "write -P 2 0 100M")
    await freeze(storage, SANDBOX, SECOND)
    await freeze(storage, SANDBOX, FIRST)
    before = files_in(layout.root)
    for pause_seconds in (0, 0.005, 0.02, 0.05, 0.1):
        copying = asyncio.create_task(storage.ensure_snapshot_disk(FIRST, SANDBOX))
        await asyncio.sleep(pause_seconds)
        copying.cancel()
        ended = (await asyncio.gather(copying, return_exceptions=True))[0]
        if isinstance(ended, SnapshotDisk):  # it was quicker
            await storage.ensure_snapshot_disk_absent(FIRST)
            return
        left = files_in(layout.root)
        left.pop(f"snapshots/{FIRST}.sha256", None)
        assert left == before
