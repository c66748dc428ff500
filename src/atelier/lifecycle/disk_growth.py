"""Grows a sandbox's disk, and a running guest's root file system to it, online. Used by the steps of creates, starts and
resizes."""

from __future__ import annotations

from pathlib import Path

from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.model.errors import GuestError, GuestUnreachableError, NotFoundError
from atelier.model.guest import ProcessEnded, ProcessOutput, ProcessSpec
from atelier.model.machine import ROOT_DISK_SERIAL
from atelier.model.sandbox import Sandbox

_GROWTH_SECONDS = 300.0
_GROWTH_OUTPUT_BYTES = 4096
_PROGRAM_NOT_FOUND = 127
# The device node may be missing in an image with a /dev of its own. The growth is online, to the disk's size.
_GROWTH_SCRIPT = (
    "test -e /dev/vda || { IFS=: read -r major minor </sys/block/vda/dev && mknod /dev/vda b $major $minor; }; "
    "exec resize2fs /dev/vda"
)


async def grow_disk(vmm: VmmDriver, storage: StorageDriver, sandbox: Sandbox, run_directory: Path) -> None:
    """To the size that the sandbox's row promises, whether its machine runs or not."""
    runs = await vmm.find_process(sandbox.id, run_directory) is not None
    if not runs or storage.grows_open_volumes:
        await storage.grow_volume(sandbox.id, sandbox.spec.disk_mib)
    if runs:
        await vmm.resize_disk(run_directory, ROOT_DISK_SERIAL, sandbox.spec.disk_mib)


async def grow_root_file_system(guests: GuestDriver, sandbox_id: str) -> str:
    """Grow the root file system to its disk, online. Returns a warning where the image cannot; raises GuestError
    when it should have worked."""
    spec = ProcessSpec(("sh", "-c", _GROWTH_SCRIPT), user="root", timeout_seconds=_GROWTH_SECONDS)
    without = "the image has no resize2fs: the file system keeps the image's size, not the disk's"
    output = bytearray()
    try:
        async with guests.start_process(sandbox_id, spec) as events:
            async for event in events:
                if isinstance(event, ProcessOutput):
                    output += event.data
                    del output[:-_GROWTH_OUTPUT_BYTES]
                elif isinstance(event, ProcessEnded):
                    if event.exit_code == 0:
                        return ""
                    if event.exit_code == _PROGRAM_NOT_FOUND:
                        return without
                    said = output.decode("utf-8", "replace").strip()
                    raise GuestError(
                        f"the file system could not be grown: resize2fs: {event.error or event.status}: {said}",
                        code="file_system_not_grown",
                        hint="look at the console's end for errors of the disk",
                    )
    except NotFoundError:
        return without
    raise GuestUnreachableError(f"the guest of {sandbox_id} went silent while its file system was grown")
