"""A crash at any change of a file: there is the old state or the new one, and a later call completes it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.forked_programs import PROCESSES
from tests.qcow2_disks import IMAGE_NAME, files_in, find_volume, freeze, holds, make_image, write
from tests.real_machines import missing_programs

from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.model.layout import DiskLayout
from atelier.model.machine import DiskFile, VolumeRequest

NO_QEMU_IMG = missing_programs("qemu-img", "qemu-io")
pytestmark = pytest.mark.skipif(bool(NO_QEMU_IMG), reason=NO_QEMU_IMG)

SANDBOX, FIRST, SECOND = "aaaaaaaaaaaa", "ssssssssssss", "tttttttttttt"


@pytest.fixture
def base(tmp_path: Path) -> DiskFile:
    return make_image(tmp_path / "cache")


CHANGES = {
    *("os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"),
    *("open", "subprocess.Popen"),
}
CRASHED = 77


def crash_at(volumes: Path, number: int, operation: str, *arguments: str, **options: bool) -> bool:
    """Do it in a process that ends itself before its ``number``-th change of a file; whether it came to its end."""
    process = PROCESSES.Process(target=_do, args=(volumes, number, operation, arguments, options))
    process.start()
    process.join()
    assert process.exitcode in (0, CRASHED), "it says why above"
    return process.exitcode == 0


def _do(volumes: Path, number: int, operation: str, arguments: tuple[str, ...], options: dict[str, bool]) -> None:
    left = number

    def end_before_a_change(event: str, values: tuple[object, ...]) -> None:
        nonlocal left
        if event not in CHANGES or not any(str(volumes) in str(value) for value in values):
            return
        if event == "open" and isinstance(values[2], int) and not values[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left -= 1
        if left < 0:
            os._exit(CRASHED)

    storage = Qcow2Storage(volumes)
    sys.addaudithook(end_before_a_change)
    asyncio.run(getattr(storage, operation)(*arguments, **options))


@pytest.mark.parametrize("switched", [True, False])
async def test_a_crash_at_any_change_of_a_file_while_freezing(base: DiskFile, tmp_path: Path, switched: bool) -> None:
    finished = crashes = 0
    while finished < 2:
        volumes = tmp_path / f"volumes{crashes}"
        storage, layout = Qcow2Storage(volumes), DiskLayout(volumes)
        volume = (await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))).top.path
        write(volume, 2, at_mib=1)
        old = await find_volume(storage, SANDBOX)
        # First through ``begin``, then, that whole, through ``end``.
        operation, options = "begin_layer", dict[str, bool]()
        if finished == 1:
            next_top = await storage.begin_layer(SANDBOX, FIRST)
            if switched:
                write(next_top.path, 3, at_mib=2)
            operation, options = "end_layer", {"switched": switched}
        through = crash_at(volumes, crashes, operation, SANDBOX, FIRST, **options)
        again = Qcow2Storage(volumes)
        if finished == 0:
            assert await again.find_volume(SANDBOX) == old
            assert holds(volume, 1, 2, 1)
            if crashes % 2:
                await again.begin_layer(SANDBOX, FIRST)
            await again.end_layer(SANDBOX, FIRST, switched=False)
            assert files_in(volumes).keys() == {volume.name, f"bases/{IMAGE_NAME}"}
            write((await again.begin_layer(SANDBOX, FIRST)).path, 3, at_mib=2)
        else:
            await again.end_layer(SANDBOX, FIRST, switched=switched)
            if not switched:
                assert await again.find_volume(SANDBOX) == old
                assert files_in(volumes).keys() == {volume.name, f"bases/{IMAGE_NAME}"}
                assert volume.stat().st_mode & 0o777 == 0o600
                assert holds(volume, 1, 2, 1)
        if finished == 0 or switched:
            await again.end_layer(SANDBOX, FIRST, switched=True)
            new = await find_volume(again, SANDBOX)
            assert len(new.backing) == 2
            assert holds(volume, 1, 2, 3)
            assert holds((await again.ensure_snapshot_disk(FIRST, SANDBOX)).disk.top.path, 1, 2, 1)
            assert not list(left_overs(layout))
        crashes += 1
        if through:
            assert crashes > (4 if finished == 0 else 1), "there were changes to crash at"
            finished, crashes = finished + 1, 0
            for folder in tmp_path.glob("volumes*"):
                subprocess.run(["rm", "-r", str(folder)], check=True)


def left_overs(layout: DiskLayout) -> Iterator[Path]:
    yield from layout.root.rglob("*.new*")
    yield from layout.root.rglob("*.next")
    yield from layout.root.rglob("*.layer")


async def test_a_crash_at_any_change_of_a_file_while_a_disk_is_made(base: DiskFile, tmp_path: Path) -> None:
    through, crashes = False, 0
    while not through:
        volumes = tmp_path / f"volumes{crashes}"
        storage, layout = Qcow2Storage(volumes), DiskLayout(volumes)
        volume = (await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))).top.path
        write(volume, 2, at_mib=1)
        await freeze(storage, SANDBOX, SECOND)
        write(volume, 3, at_mib=2)
        await freeze(storage, SANDBOX, FIRST)
        through = crash_at(volumes, crashes, "ensure_snapshot_disk", FIRST, SANDBOX)
        again = Qcow2Storage(volumes)
        whole = await again.find_snapshot_disk(FIRST)
        if whole is not None:
            await again.verify_snapshot_disk(FIRST)
            assert holds(whole.top.path, 1, 2, 3, 1)
        if crashes % 2:
            assert holds((await again.ensure_snapshot_disk(FIRST, SANDBOX)).disk.top.path, 1, 2, 3, 1)
        await again.ensure_snapshot_disk_absent(FIRST)
        assert holds((await again.ensure_snapshot_disk(SECOND, SANDBOX)).disk.top.path, 1, 2, 1, 1)
        assert holds(volume, 1, 2, 3, 1)
        assert not list(left_overs(layout))
        subprocess.run(["rm", "-r", str(volumes)], check=True)
        crashes += 1
    assert crashes > 8, "there were changes to crash at"


async def test_a_crash_at_any_change_of_a_file_while_merging(base: DiskFile, tmp_path: Path) -> None:
    through, crashes = False, 0
    while not through:
        volumes = tmp_path / f"volumes{crashes}"
        storage = Qcow2Storage(volumes)
        volume = (await storage.ensure_volume(VolumeRequest(SANDBOX, base, 64))).top.path
        write(volume, 2, at_mib=1)
        await freeze(storage, SANDBOX, FIRST)
        write(volume, 3, at_mib=2)
        await storage.ensure_snapshot_disk_absent(FIRST)
        through = crash_at(volumes, crashes, "shorten_volume", SANDBOX)
        again = Qcow2Storage(volumes)
        assert await again.find_volume(SANDBOX) is not None
        assert holds(volume, 1, 2, 3, 1)
        await again.shorten_volume(SANDBOX)
        assert holds(volume, 1, 2, 3, 1)
        assert files_in(volumes).keys() == {volume.name, f"bases/{IMAGE_NAME}"}
        subprocess.run(["rm", "-r", str(volumes)], check=True)
        crashes += 1
    assert crashes > 4, "there were changes to crash at"
