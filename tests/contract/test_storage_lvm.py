"""Thin volumes as LVM has them: device nodes, contents, sizes, what a crash and a full pool leave.

Runs as root in an emulated host, which has a pool to work in (``tests/host/test_lvm_storage.py``).
"""

from __future__ import annotations

import logging
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.contract.storage_kinds import THIN_POOL, RootInProcess, lvm_settings

from atelier.drivers.storage.lvm_thin import LvmThinStorage
from atelier.host import command
from atelier.host.file_lock import hold_opened, open_lock
from atelier.host.lvm import ThinPool
from atelier.host_setup.root_settings import RootSettings
from atelier.host_setup.storage_verbs import StorageVerbs
from atelier.model.errors import DiskFullError, HostError
from atelier.model.machine import DiskFile, VolumeRequest

pytestmark = pytest.mark.skipif(not THIN_POOL, reason="not applicable: runs in an emulated host (scripts/test-host)")

SANDBOX, OTHER, FIRST = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "ssssssssssss"
MIB = 1024 * 1024
GROUP, _, POOL = THIN_POOL.partition("/")


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[RootSettings]:
    found = lvm_settings(tmp_path)
    yield found
    for name in names_of(found):
        subprocess.run(["lvremove", "-q", "-y", f"{GROUP}/{name}"], check=True, capture_output=True)


@pytest.fixture
def storage(settings: RootSettings) -> LvmThinStorage:
    return LvmThinStorage(RootInProcess(settings))


@pytest.fixture
def base(tmp_path: Path) -> DiskFile:
    """16 MiB with a file system and a file in it."""
    folder, path = tmp_path / "content", tmp_path / "base-0123456789abcdef.ext4"
    folder.mkdir()
    (folder / "words").write_text("the base's words")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", folder, path, "16M"], check=True, capture_output=True)
    path.chmod(0o444)
    return DiskFile(path, "raw")


def lvs(*fields: str) -> list[list[str]]:
    told = subprocess.check_output(["lvs", "--noheadings", "--separator", "|", "-o", ",".join(fields), GROUP])
    return [[word.strip() for word in line.split("|")] for line in told.decode().splitlines()]


def names_of(settings: RootSettings) -> list[str]:
    return [name for (name,) in lvs("lv_name") if name.startswith(f"at-{settings.installation_id}-")]


def write(path: Path, byte: int, at_mib: int) -> None:
    with path.open("r+b", buffering=0) as disk:
        disk.seek(at_mib * MIB)
        disk.write(bytes([byte]) * MIB)
        os.fsync(disk.fileno())


def holds(path: Path, at_mib: int, byte: int) -> bool:
    with path.open("rb", buffering=0) as disk:
        disk.seek(at_mib * MIB)
        return disk.read(MIB) == bytes([byte]) * MIB


async def test_a_volume_has_its_device_at_once_and_after_a_restart_of_the_group(
    storage: LvmThinStorage, settings: RootSettings, base: DiskFile
) -> None:
    """Without ``-kn`` there would be no device, neither now nor then."""
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 16))
    device = ThinPool(GROUP, POOL).device(f"at-{settings.installation_id}-volume-{SANDBOX}")
    assert stat.S_ISBLK(device.stat().st_mode)
    assert disk.top.path.stat().st_rdev == device.stat().st_rdev
    subprocess.run(["vgchange", "-q", "-an", GROUP], check=True, capture_output=True)
    assert not device.exists()
    subprocess.run(["vgchange", "-q", "-ay", GROUP], check=True, capture_output=True)
    assert stat.S_ISBLK(device.stat().st_mode)
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 16))
    assert disk.top.path.stat().st_rdev == device.stat().st_rdev


async def test_a_clone_that_is_larger_takes_a_larger_file_system(
    storage: LvmThinStorage, base: DiskFile, tmp_path: Path
) -> None:
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    node = disk.top.path
    subprocess.run(["e2fsck", "-f", "-p", node], check=True)
    subprocess.run(["resize2fs", node], check=True, capture_output=True)
    place = tmp_path / "mounted"
    place.mkdir()
    device = Path("/dev") / GROUP / next(n for (n,) in lvs("lv_name") if n.endswith(SANDBOX))
    subprocess.run(["mount", device, place], check=True)
    try:
        assert (place / "words").read_text() == "the base's words"
        assert os.statvfs(place).f_blocks * os.statvfs(place).f_frsize > 48 * MIB
        # What is deleted in the guest comes back to the pool.
        (place / "large").write_bytes(os.urandom(24 * MIB))
        os.sync()
        full = await storage.used_bytes(SANDBOX)
        (place / "large").unlink()
        os.sync()
        subprocess.run(["fstrim", place], check=True)
        assert await storage.used_bytes(SANDBOX) < full - 16 * MIB
    finally:
        subprocess.run(["umount", place], check=True)


async def test_what_a_growth_that_was_broken_off_lacks_is_made_up_for(
    storage: LvmThinStorage, base: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_room(*_: object) -> None:
        raise DiskFullError("as told")

    with monkeypatch.context() as broken:
        broken.setattr(ThinPool, "extend", no_room)
        with pytest.raises(DiskFullError):
            await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    with disk.top.path.open("rb") as device:
        assert device.seek(0, os.SEEK_END) == 64 * MIB
    await storage.grow_volume(SANDBOX, 66)
    await storage.grow_volume(SANDBOX, 66)


async def test_a_snapshot_has_what_was_written_before_it_was_frozen_and_nothing_after(
    storage: LvmThinStorage, base: DiskFile
) -> None:
    volume = (await storage.ensure_volume(VolumeRequest(SANDBOX, base, 32))).top.path
    write(volume, 2, at_mib=20)
    assert (await storage.begin_layer(SANDBOX, FIRST)).path == volume
    write(volume, 3, at_mib=21)
    await storage.freeze_layer(SANDBOX, FIRST)
    write(volume, 4, at_mib=20)
    write(volume, 4, at_mib=22)
    await storage.freeze_layer(SANDBOX, FIRST)
    await storage.end_layer(SANDBOX, FIRST, switched=True)
    made = await storage.ensure_snapshot_disk(FIRST, SANDBOX)
    frozen = made.disk.top.path
    assert [holds(frozen, at, byte) for at, byte in ((20, 2), (21, 3), (22, 0))] == [True] * 3
    with pytest.raises(OSError, match=r"denied|permitted|Read-only"):
        write(frozen, 9, at_mib=1)
    ids = [f"{letter * 12}" for letter in "cdefgh"]
    clones = [(await storage.ensure_volume(VolumeRequest(each, made.disk.top, 32))).top.path for each in ids]
    for number, clone in enumerate(clones):
        write(clone, 10 + number, at_mib=23)
    assert all(holds(clone, 20, 2) and holds(clone, 23, 10 + number) for number, clone in enumerate(clones))
    assert holds(volume, 23, 0)
    await storage.verify_snapshot_disk(FIRST)
    await storage.ensure_volume_absent(SANDBOX)
    await storage.ensure_snapshot_disk_absent(FIRST)
    assert all(holds(clone, 21, 3) for clone in clones), "a clone needs neither"


async def test_what_is_not_this_installations_is_neither_told_nor_touched(
    storage: LvmThinStorage, settings: RootSettings, base: DiskFile, tmp_path: Path
) -> None:
    others = lvm_settings(tmp_path / "another")
    another = LvmThinStorage(RootInProcess(others))
    await another.ensure_volume(VolumeRequest(SANDBOX, base, 16))
    subprocess.run(["lvcreate", "-q", "-V", "8M", "-T", THIN_POOL, "-n", "somebodys"], check=True, capture_output=True)
    try:
        before = names_of(others)
        assert await storage.list_volumes() == []
        await storage.ensure_volume_absent(SANDBOX)
        await storage.ensure_volume(VolumeRequest(SANDBOX, base, 16))
        await storage.ensure_volume_absent(SANDBOX)
        assert names_of(others) == before
        assert ["somebodys"] in lvs("lv_name")
        assert await another.list_volumes() == [SANDBOX]
    finally:
        for name in (*names_of(others), "somebodys"):
            subprocess.run(["lvremove", "-q", "-y", f"{GROUP}/{name}"], check=True, capture_output=True)


async def test_a_volume_that_is_in_use_is_not_removed(storage: LvmThinStorage, base: DiskFile) -> None:
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 16))
    with disk.top.path.open("rb"):
        with pytest.raises(HostError) as refusal:
            await storage.ensure_volume_absent(SANDBOX)
        assert refusal.value.code == "volume_in_use"
        assert "fuser" in refusal.value.hint
    await storage.ensure_volume_absent(SANDBOX)
    assert not disk.top.path.exists()


async def test_a_base_goes_when_another_image_came_and_nothing_is_made_from_it(
    storage: LvmThinStorage, settings: RootSettings, base: DiskFile
) -> None:
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 16))
    newer = DiskFile(base.path.with_name("base-fedcba9876543210.ext4"), "raw")
    newer.path.write_bytes(base.path.read_bytes())
    await storage.ensure_volume(VolumeRequest(OTHER, newer, 16))
    assert sum("-base-" in name for name in names_of(settings)) == 2, "a volume's own is kept"
    await storage.ensure_volume_absent(SANDBOX)
    newest = DiskFile(base.path.with_name("base-0000000000000000.ext4"), "raw")
    newest.path.write_bytes(base.path.read_bytes())
    await storage.ensure_volume(VolumeRequest(SANDBOX, newest, 16))
    assert sum("-base-" in name for name in names_of(settings)) == 2


def crash_at(number: int, settings: RootSettings, request: VolumeRequest, lock: Path) -> bool:
    """Whether a process that makes a volume was killed: as its ``number``-th command had just begun, which goes on and
    keeps the ``lock`` of its group of verbs until it ends."""
    child = os.fork()
    if child == 0:
        import asyncio

        held = open_lock(lock)
        left = number
        real_run = command.run

        async def dying_run(arguments: Sequence[str], **options: Any) -> command.CommandResult:
            nonlocal left
            left -= 1
            if left == 0:
                subprocess.Popen(
                    arguments,
                    stdin=options["standard_input"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                os.kill(os.getpid(), 9)
            return await real_run(arguments, **options)

        command.run = dying_run
        try:
            with hold_opened(held):
                asyncio.run(LvmThinStorage(RootInProcess(settings, lock=held)).ensure_volume(request))
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, 9), status
    return status == 9


async def test_a_kill_at_any_command_leaves_what_the_next_manager_makes_whole(
    settings: RootSettings, base: DiskFile, tmp_path: Path
) -> None:
    request = VolumeRequest(SANDBOX, base, 64)
    content = base.path.read_bytes()
    number = 1
    lock = open_lock(tmp_path / "lock")
    while crash_at(number, settings, request, tmp_path / "lock"):
        storage = LvmThinStorage(RootInProcess(settings))
        with hold_opened(lock):
            disk = await storage.ensure_volume(request)
        with disk.top.path.open("rb") as device:
            assert device.read(len(content)) == content
            assert device.seek(0, os.SEEK_END) == 64 * MIB
        await storage.ensure_volume_absent(SANDBOX)
        assert [name.split("-")[2] for name in names_of(settings)] == ["base"]
        subprocess.run(["lvremove", "-q", "-y", f"{GROUP}/{names_of(settings)[0]}"], check=True, capture_output=True)
        number += 1
    os.close(lock)
    assert number > 8, "as many commands as that are run"
    assert await LvmThinStorage(RootInProcess(settings)).list_volumes() == [SANDBOX]


@pytest.fixture
def small_pool(settings: RootSettings) -> Iterator[RootSettings]:
    """64 MiB that LVM does not extend."""
    making = ["lvcreate", "-q", "--type", "thin-pool", "-Zy", "-L", "64M", "-n", "small", GROUP]
    subprocess.run(making, check=True, capture_output=True)
    subprocess.run(["lvchange", "-q", "--errorwhenfull", "y", f"{GROUP}/small"], check=True, capture_output=True)
    yield RootSettings("root", settings.installation_id, GROUP, "small")
    subprocess.run(["lvremove", "-q", "-y", f"{GROUP}/small"], check=True, capture_output=True)


async def test_a_pool_that_is_nearly_full_is_told_and_takes_nothing_new(
    small_pool: RootSettings, base: DiskFile, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LvmThinStorage(RootInProcess(small_pool))
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 128))
    free = await storage.free_bytes()
    assert 0 < free < 64 * MIB
    with caplog.at_level(logging.ERROR):
        at_mib = 16
        while (await storage.pool_state()).data_used < 0.80:
            write(disk.top.path, at_mib % 256, at_mib=at_mib)
            at_mib += 1
        await storage.pool_state()
        assert caplog.text.count("the thin pool is filling up") == 1
    while (await storage.pool_state()).data_used < 0.95:
        write(disk.top.path, at_mib % 256, at_mib=at_mib)
        at_mib += 1
    assert await storage.free_bytes() == 0
    with pytest.raises(DiskFullError) as refusal:
        await storage.ensure_volume(VolumeRequest(OTHER, base, 128))
    assert refusal.value.code == "pool_full"
    assert "lvextend" in refusal.value.hint
    await storage.begin_layer(SANDBOX, FIRST)
    with pytest.raises(DiskFullError):
        await storage.freeze_layer(SANDBOX, FIRST)
    await storage.end_layer(SANDBOX, FIRST, switched=False)
    assert await storage.list_volumes() == [SANDBOX]
    assert holds(disk.top.path, 17, 17)
    await storage.ensure_volume_absent(SANDBOX)
    await storage.ensure_volume(VolumeRequest(OTHER, base, 128))


async def test_a_pool_whose_metadata_are_nearly_full_takes_nothing_new(
    settings: RootSettings, base: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_look = ThinPool.look

    async def full_look(pool: ThinPool) -> Any:
        from dataclasses import replace

        usage, found = await real_look(pool)
        return replace(usage, metadata_used=0.91), found

    monkeypatch.setattr(ThinPool, "look", full_look)
    with pytest.raises(DiskFullError, match="metadata"):
        await LvmThinStorage(RootInProcess(settings)).ensure_volume(VolumeRequest(SANDBOX, base, 16))


async def test_a_group_a_pool_or_zeroing_that_is_missing_is_named(settings: RootSettings) -> None:
    for group, pool, code in (
        ("no-such-group", POOL, "volume_group_missing"),
        (GROUP, "no-such-pool", "thin_pool_missing"),
    ):
        verbs = StorageVerbs(RootSettings("root", settings.installation_id, group, pool))
        with pytest.raises(HostError) as refusal:
            await verbs.look({})
        assert refusal.value.code == code
        assert "atelier host storage" in refusal.value.hint
    subprocess.run(["lvchange", "-q", "-Zn", THIN_POOL], check=True, capture_output=True)
    try:
        with pytest.raises(HostError) as dirty:
            await StorageVerbs(settings).look({})
        assert dirty.value.code == "thin_pool_not_zeroing"
    finally:
        subprocess.run(["lvchange", "-q", "-Zy", THIN_POOL], check=True, capture_output=True)
