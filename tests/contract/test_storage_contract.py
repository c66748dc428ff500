"""What every storage driver keeps to, and what qcow2 volumes are on disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.contract.storage_kinds import BASE_MIB, KINDS, LASTING, NO_QEMU_IMG, files_below, make_storage

from atelier.drivers.storage.fake import FakeStorage
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.host import processes
from atelier.model.errors import DiskFullError, HostError, InvalidRequestError, MissingProgramError, NotFoundError
from atelier.model.machine import ROOT_DISK_SERIAL, DiskFile, VolumeRequest

SANDBOX, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
needs_qemu_img = pytest.mark.skipif(bool(NO_QEMU_IMG), reason=NO_QEMU_IMG)


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


@pytest.fixture
def qcow2(tmp_path: Path) -> Qcow2Storage:
    return Qcow2Storage(tmp_path / "volumes")


async def test_a_volume_stands_over_its_base(storage: StorageDriver, base: DiskFile) -> None:
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    assert disk.serial == ROOT_DISK_SERIAL
    below = [(file.path.name, file.format) for file in disk.backing]
    assert below == [(base.path.name, base.format)][: files_below(storage, 1)]
    assert not disk.read_only
    assert disk.top.path != base.path


async def test_ensuring_twice_gives_the_same_volume(storage: StorageDriver, base: DiskFile) -> None:
    request = VolumeRequest(SANDBOX, base, 64)
    disk = await storage.ensure_volume(request)
    assert await storage.ensure_volume(request) == disk
    assert await storage.list_volumes() == [SANDBOX]


async def test_volumes_come_and_go(storage: StorageDriver, base: DiskFile) -> None:
    assert await storage.list_volumes() == []
    assert await storage.used_bytes(SANDBOX) == 0
    await storage.ensure_volume_absent(SANDBOX)
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await storage.ensure_volume(VolumeRequest(OTHER, base, 64))
    assert await storage.list_volumes() == [SANDBOX, OTHER]
    assert await storage.used_bytes(SANDBOX) < 1024 * 1024
    assert (await storage.used_bytes(SANDBOX) > 0) == (files_below(storage, 1) > 0), (
        "a file counts, a thin volume does not"
    )
    await storage.ensure_volume_absent(SANDBOX)
    await storage.ensure_volume_absent(SANDBOX)
    assert await storage.list_volumes() == [OTHER]
    assert await storage.used_bytes(SANDBOX) == 0


async def test_a_disk_below_the_base_is_refused(storage: StorageDriver, base: DiskFile) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        await storage.ensure_volume(VolumeRequest(SANDBOX, base, BASE_MIB - 1))
    assert refusal.value.code == "disk_too_small"
    assert str(BASE_MIB) in refusal.value.hint
    assert await storage.list_volumes() == []
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, BASE_MIB))


async def test_a_volume_is_found_as_it_was_made(storage: StorageDriver, base: DiskFile) -> None:
    assert await storage.find_volume(SANDBOX) is None
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    assert await storage.find_volume(SANDBOX) == disk
    assert await storage.find_volume(OTHER) is None
    await storage.ensure_volume_absent(SANDBOX)
    assert await storage.find_volume(SANDBOX) is None


@pytest.mark.parametrize("kind", LASTING)
async def test_volumes_outlive_the_driver(kind: str, base: DiskFile, tmp_path: Path) -> None:
    first = make_storage(kind, tmp_path / "volumes")
    disk = await first.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await first.ensure_volume(VolumeRequest(OTHER, base, 64))
    await first.grow_volume(SANDBOX, 96)
    await first.ensure_volume_absent(OTHER)
    again = make_storage(kind, tmp_path / "volumes")
    assert await again.list_volumes() == [SANDBOX]
    assert await again.find_volume(SANDBOX) == disk
    with pytest.raises(InvalidRequestError):
        await again.grow_volume(SANDBOX, 95)
    await again.ensure_volume_absent(SANDBOX)
    assert await make_storage(kind, tmp_path / "volumes").list_volumes() == []


async def test_a_volume_grows_and_never_shrinks(storage: StorageDriver, base: DiskFile) -> None:
    with pytest.raises(NotFoundError) as absent:
        await storage.grow_volume(SANDBOX, 64)
    assert absent.value.code == "volume_not_found"
    disk = await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    await storage.grow_volume(SANDBOX, 64)
    await storage.grow_volume(SANDBOX, 96)
    await storage.grow_volume(SANDBOX, 96)
    with pytest.raises(InvalidRequestError) as refusal:
        await storage.grow_volume(SANDBOX, 95)
    assert refusal.value.code == "disk_cannot_shrink"
    assert await storage.find_volume(SANDBOX) == disk


@pytest.mark.parametrize("name", ["../escape", "", "aaaaaaaaaaaa.qcow2", "AAAAAAAAAAAA"])
async def test_what_is_no_id_is_refused(storage: StorageDriver, base: DiskFile, name: str) -> None:
    with pytest.raises(InvalidRequestError):
        await storage.ensure_volume(VolumeRequest(name, base, 64))
    with pytest.raises(InvalidRequestError):
        await storage.ensure_volume_absent(name)
    with pytest.raises(InvalidRequestError):
        await storage.find_volume(name)
    with pytest.raises(InvalidRequestError):
        await storage.grow_volume(name, 64)


async def test_there_is_room(storage: StorageDriver) -> None:
    assert await storage.free_bytes() > 0


async def test_many_at_once(storage: StorageDriver, base: DiskFile) -> None:
    ids = [f"{letter * 12}" for letter in "abcdefgh"]
    await asyncio.gather(*(storage.ensure_volume(VolumeRequest(sandbox, base, 64)) for sandbox in ids))
    assert await storage.list_volumes() == ids
    await asyncio.gather(*(storage.ensure_volume_absent(sandbox) for sandbox in ids))
    assert await storage.list_volumes() == []


async def test_the_fake_fills_up_and_fails_as_told(base: DiskFile) -> None:
    storage = FakeStorage(capacity_bytes=300 * 1024)
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    with pytest.raises(DiskFullError):
        await storage.ensure_volume(VolumeRequest(OTHER, base, 64))
    storage.faults.fail_next("list_volumes", DiskFullError("as told"))
    with pytest.raises(DiskFullError, match="as told"):
        await storage.list_volumes()
    assert await storage.list_volumes() == [SANDBOX]


@needs_qemu_img
async def test_a_qcow2_volume_is_sparse_private_and_leaves_its_base_alone(
    qcow2: Qcow2Storage, base: DiskFile, tmp_path: Path
) -> None:
    before = hashlib.sha256(base.path.read_bytes()).hexdigest()
    disk = await qcow2.ensure_volume(VolumeRequest(SANDBOX, base, 4096))
    told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(disk.top.path)]))
    assert told["virtual-size"] == 4096 * 1024 * 1024
    assert told["backing-filename"] == str(tmp_path / "volumes" / "bases" / base.path.name)
    assert told["backing-filename-format"] == "raw"
    assert disk.top.path.stat().st_mode & 0o777 == 0o600
    assert disk.top.path.parent.stat().st_mode & 0o777 == 0o700
    first = subprocess.check_output(["qemu-io", "-f", "qcow2", "-r", "-c", "read -v 0 22", str(disk.top.path)])
    assert b"the.base.s.first" in first
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", str(disk.top.path)], check=True)
    assert await qcow2.used_bytes(SANDBOX) > 1024 * 1024
    assert hashlib.sha256(base.path.read_bytes()).hexdigest() == before
    assert sorted(entry.name for entry in (tmp_path / "volumes").iterdir()) == [f"{SANDBOX}.qcow2", "bases"]


@needs_qemu_img
async def test_what_a_crash_left_half_made_is_no_volume(qcow2: Qcow2Storage, base: DiskFile, tmp_path: Path) -> None:
    half = tmp_path / "volumes" / f"{SANDBOX}.qcow2.new"
    half.parent.mkdir(mode=0o700)
    half.write_bytes(b"half")
    (half.parent / "notes.txt").write_text("somebody's")
    assert await qcow2.list_volumes() == []
    disk = await qcow2.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    assert not half.exists()
    subprocess.run(["qemu-img", "check", "-q", str(disk.top.path)], check=True)
    half.write_bytes(b"half")
    await qcow2.ensure_volume_absent(SANDBOX)
    assert [entry.name for entry in half.parent.iterdir()] == ["notes.txt"]


@needs_qemu_img
async def test_the_size_of_a_qcow2_base_is_its_disks_size(qcow2: Qcow2Storage, tmp_path: Path) -> None:
    path = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "100M"], check=True)
    with pytest.raises(InvalidRequestError, match="100 MiB"):
        await qcow2.ensure_volume(VolumeRequest(SANDBOX, DiskFile(path, "qcow2"), 99))
    await qcow2.ensure_volume(VolumeRequest(SANDBOX, DiskFile(path, "qcow2"), 100))


async def test_a_base_that_is_not_there(qcow2: Qcow2Storage, tmp_path: Path) -> None:
    with pytest.raises(HostError) as refusal:
        await qcow2.ensure_volume(VolumeRequest(SANDBOX, DiskFile(tmp_path / "absent", "raw"), 64))
    assert refusal.value.code == "disk_file_missing"
    assert await qcow2.list_volumes() == []


async def test_without_qemu_img_the_package_is_named(
    qcow2: Qcow2Storage, base: DiskFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgramError) as refusal:
        await qcow2.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    assert refusal.value.hint == "apt-get install qemu-utils"
    assert list((tmp_path / "volumes").iterdir()) == []


@pytest.fixture
def tiny_file_system(tmp_path: Path) -> Iterator[Path]:
    """256 KiB: room for one volume's tables, not for two."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@needs_qemu_img
async def test_a_full_disk_is_said_and_leaves_nothing(tiny_file_system: Path, base: DiskFile) -> None:
    storage = Qcow2Storage(tiny_file_system / "volumes")
    await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))
    (tiny_file_system / "filler").write_bytes(b"x" * (await storage.free_bytes()))
    with pytest.raises(DiskFullError) as refusal:
        await storage.ensure_volume(VolumeRequest(OTHER, base, 64))
    assert refusal.value.hint
    assert sorted(entry.name for entry in (tiny_file_system / "volumes").iterdir()) == [f"{SANDBOX}.qcow2", "bases"]


_STARTED_LATE = """#!/bin/sh
echo $$ >{folder}/pid
while [ ! -e {folder}/go ]; do sleep 0.02; done
exec {qemu_img} "$@"
"""
_MANAGER = """
import sys
from pathlib import Path
import uvloop
from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.model.machine import DiskFile, VolumeRequest

sandbox_id, volumes, base = sys.argv[1:]
uvloop.run(Qcow2Storage(Path(volumes)).ensure_volume(VolumeRequest(sandbox_id, DiskFile(Path(base), "raw"), 64)))
"""


@needs_qemu_img
@pytest.mark.parametrize("dies", [False, True])
async def test_what_a_dead_manager_had_begun_makes_no_volume_behind_the_next_one(
    qcow2: Qcow2Storage, base: DiskFile, tmp_path: Path, dies: bool
) -> None:
    programs, volumes = tmp_path / "programs", tmp_path / "volumes"
    programs.mkdir()
    (programs / "qemu-img").write_text(_STARTED_LATE.format(folder=programs, qemu_img=shutil.which("qemu-img")))
    (programs / "qemu-img").chmod(0o755)
    manager = subprocess.Popen(
        [sys.executable, "-c", _MANAGER, SANDBOX, str(volumes), str(base.path)],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
    )
    try:
        pid_file = programs / "pid"
        await until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
        qemu_img = processes.find_identity(int(pid_file.read_text()))
        assert qemu_img is not None
        if dies:
            manager.kill()
            manager.wait()
            await qcow2.ensure_volume_absent(SANDBOX)
        (programs / "go").touch()
        async with asyncio.timeout(60):
            await processes.wait_ended(qemu_img)
        if dies:
            assert [path.name for path in volumes.iterdir() if SANDBOX in path.name] == []
        else:
            assert await asyncio.to_thread(manager.wait) == 0
            assert await qcow2.list_volumes() == [SANDBOX]
    finally:
        manager.kill()
        manager.wait()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)
