"""A guest whose VMM gives its disks serials of its own, as Firecracker does: it takes them in their order."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.real_machines import NO_QEMU, emulated, get_base_image, get_boot_files, machine_spec, make_overlay

from atelier.drivers.vmm import qemu_launch
from atelier.drivers.vmm.qemu_arguments import kernel_command_line
from atelier.model.machine import Disk, DiskFile

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

SANDBOX = "aaaaaaaaaaaa"
PATIENCE_SECONDS = 120


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not pytest's folder: its path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="atelier-order-"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("is_told", [True, False])
async def test_disks_without_our_serials(folder: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool) -> None:
    if is_told:
        monkeypatch.setattr(
            qemu_launch,
            "kernel_command_line",
            lambda accelerator, tsc_khz: kernel_command_line(accelerator, tsc_khz, ("atelier.disks=in-order",)),
        )
    boot, image = await get_boot_files(), await get_base_image()
    vmm = emulated("order", folder)
    spec = machine_spec(SANDBOX, "order", boot, folder)
    root = replace(make_overlay(folder / "root.qcow2", DiskFile(image.path, "raw")), serial="20510012345")
    tools = Disk("20510054321", DiskFile(boot.tools, "raw"), read_only=True)
    await vmm.ensure_run_directory(SANDBOX, spec.run_directory)
    try:
        await vmm.ensure_started(replace(spec, root=root, tools=tools, memory_mib=256))
        wanted = b"starting the guest agent" if is_told else b"no disk with the serial atelier-root"
        async with asyncio.timeout(PATIENCE_SECONDS):
            while wanted not in await vmm.console_tail(spec.run_directory, 10_000):
                await asyncio.sleep(0.1)
    finally:
        await vmm.ensure_stopped(SANDBOX, spec.run_directory, None)
