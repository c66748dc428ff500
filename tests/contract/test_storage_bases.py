"""What volumes stand over: bases that outlive the image cache, and go with the last volume that needs them."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from tests.real_machines import missing_programs

from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.model.errors import HostError, InvalidRequestError
from atelier.model.machine import DiskFile, VolumeRequest

NO_QEMU_IMG = missing_programs("qemu-img")
pytestmark = pytest.mark.skipif(bool(NO_QEMU_IMG), reason=NO_QEMU_IMG)

SANDBOX, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
WORDS = b"the base's first bytes"
MIB = 1024 * 1024


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    return tmp_path / "volumes"


@pytest.fixture
def storage(volumes: Path) -> Qcow2Storage:
    return Qcow2Storage(volumes)


def make_base(folder: Path, name: str = "base-0123456789abcdef.ext4") -> DiskFile:
    folder.mkdir(exist_ok=True)
    path = folder / name
    with path.open("wb") as file:
        file.write(WORDS)
        file.truncate(8 * MIB)
    path.chmod(0o444)
    return DiskFile(path, "raw")


def read_start(volume: Path) -> bytes:
    return subprocess.check_output(["qemu-io", "-f", "qcow2", "-r", "-c", "read -v 0 22", str(volume)])


def make_overlay(volume: Path, base: Path) -> None:
    volume.parent.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["qemu-img", "create", "-qu", "-f", "qcow2", "-F", "raw", "-b", base, volume, "64M"], check=True)


async def test_a_volume_outlives_the_image_cache(storage: Qcow2Storage, volumes: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "cache")
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    pin = volumes / "bases" / base.path.name
    assert disk.backing == (DiskFile(pin, "raw"),)
    assert pin.stat().st_ino == base.path.stat().st_ino, "a second name, not a second file"
    assert pin.parent.stat().st_mode & 0o777 == 0o700
    base.path.unlink()

    after = Qcow2Storage(volumes)
    assert await after.find_volume(SANDBOX) == disk
    assert await after.ensure_volume(VolumeRequest(SANDBOX, base, 64)) == disk
    assert b"the.base.s.first" in read_start(disk.top.path)
    await after.grow_volume(SANDBOX, 96)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 90M 1M", str(disk.top.path)], check=True)
    assert b"the.base.s.first" in read_start(disk.top.path)
    assert await after.list_volumes() == [SANDBOX]
    with pytest.raises(HostError) as missing:
        await after.ensure_volume(VolumeRequest(OTHER, DiskFile(tmp_path / "cache" / "other.ext4", "raw"), 64))
    assert missing.value.code == "disk_file_missing"
    assert pin.exists()


async def test_a_base_goes_with_its_last_volume(storage: Qcow2Storage, volumes: Path, tmp_path: Path) -> None:
    first, second = make_base(tmp_path / "cache"), make_base(tmp_path / "cache", "base-ffffffffffffffff.ext4")
    await storage.ensure_volume(VolumeRequest(SANDBOX, first, 64))
    await storage.ensure_volume(VolumeRequest(OTHER, first, 64))
    await storage.ensure_volume(VolumeRequest("cccccccccccc", second, 64))

    def pinned() -> list[str]:
        return sorted(entry.name for entry in (volumes / "bases").iterdir())

    await storage.ensure_volume_absent(SANDBOX)
    assert pinned() == [first.path.name, second.path.name]
    await storage.ensure_volume_absent(OTHER)
    assert pinned() == [second.path.name]
    await storage.ensure_volume_absent("cccccccccccc")
    assert list(volumes.iterdir()) == []
    assert first.path.exists()
    assert second.path.exists()


async def test_a_refused_volume_leaves_no_base(storage: Qcow2Storage, volumes: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError):
        await storage.ensure_volume(VolumeRequest(SANDBOX, make_base(tmp_path / "cache"), 7))
    assert list(volumes.iterdir()) == []


async def test_no_base_goes_while_a_volume_cannot_be_read_or_lies_elsewhere(
    storage: Qcow2Storage, volumes: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "cache")
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await storage.ensure_volume(VolumeRequest(OTHER, base, 64))
    aside = volumes / "quarantine" / "kept.qcow2"
    aside.parent.mkdir()
    disk.top.path.rename(aside)
    await storage.ensure_volume_absent(OTHER)
    assert b"the.base.s.first" in read_start(aside)

    with aside.open("r+b") as file:
        file.seek(16)
        file.write(b"\xff\xff\xff\xff")
    await storage.ensure_volume_absent(OTHER)
    assert (volumes / "bases" / base.path.name).exists()
    aside.unlink()
    await storage.ensure_volume_absent(OTHER)
    assert not (volumes / "bases").exists()


async def test_volumes_come_and_go_at_once_and_never_lose_their_base(
    storage: Qcow2Storage, volumes: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "cache")

    async def come_and_go(sandbox_id: str) -> None:
        for _ in range(6):
            disk = await storage.ensure_volume(VolumeRequest(sandbox_id, base, 64))
            assert disk.backing[0].path.read_bytes()[: len(WORDS)] == WORDS
            await storage.ensure_volume_absent(sandbox_id)

    await asyncio.gather(*(come_and_go(letter * 12) for letter in "abcdef"))
    assert list(volumes.iterdir()) == []


async def test_a_creation_that_is_given_up_leaves_nothing(storage: Qcow2Storage, volumes: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "cache")
    for pause_seconds in (0, 0.001, 0.01, 0.03):
        creating = asyncio.create_task(storage.ensure_volume(VolumeRequest(SANDBOX, base, 64)))
        await asyncio.sleep(pause_seconds)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
        await storage.ensure_volume_absent(SANDBOX)
        assert not volumes.exists() or list(volumes.iterdir()) == []


async def test_an_older_volume_straight_over_the_cache_still_works(
    storage: Qcow2Storage, volumes: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "cache")
    make_overlay(volumes / f"{SANDBOX}.qcow2", base.path)
    disk = await storage.find_volume(SANDBOX)
    assert disk is not None
    assert disk.backing == (base,)
    assert await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64)) == disk
    await storage.grow_volume(SANDBOX, 96)
    await storage.ensure_volume_absent(SANDBOX)
    assert base.path.exists()


@pytest.mark.parametrize("kind", ["secret", "writable", "link", "folder"])
async def test_a_volume_that_names_a_file_of_the_hosts_as_its_base_is_refused(
    storage: Qcow2Storage, volumes: Path, tmp_path: Path, kind: str
) -> None:
    """As a VMM that was broken out of could write into its volume's header, to be given that file at the next start."""
    named = tmp_path / "cache" / ("secret" if kind == "secret" else "base-0123456789abcdef.ext4")
    base = make_base(tmp_path / "cache", "secret")
    if kind == "writable":
        base.path.rename(named)
        named.chmod(0o644)
    elif kind == "link":
        named.symlink_to(base.path)
    elif kind == "folder":
        named.mkdir(mode=0o500)
    make_overlay(volumes / f"{SANDBOX}.qcow2", named)
    with pytest.raises(HostError) as refusal:
        await storage.find_volume(SANDBOX)
    assert refusal.value.code == "disk_file_damaged"
    assert str(named) in refusal.value.message


async def test_over_a_file_system_boundary_a_base_is_copied_with_its_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(elsewhere)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        base = make_base(tmp_path / "cache")
        disk = await Qcow2Storage(elsewhere / "volumes").ensure_volume(VolumeRequest(SANDBOX, base, 64))
        pin = disk.backing[0].path
        assert pin.read_bytes() == base.path.read_bytes()
        assert pin.stat().st_blocks * 512 < 100_000
        assert pin.stat().st_mode & 0o777 == 0o400
        assert b"the.base.s.first" in read_start(disk.top.path)
    finally:
        subprocess.run(["umount", str(elsewhere)], check=True)
