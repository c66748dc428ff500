"""Bakes a stream into an image: a machine that never runs loads the stream into a shared memory file, then writes the
rest of its state into a second one.

Called by the QEMU driver. The machine is confined as every other; it has no disk, no way out, and of files only the
stream (to read), the memory file in the making, and a pipe for the state.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from atelier.drivers.vmm.qemu_arguments import EmptyDisk, OpenMemory
from atelier.drivers.vmm.qemu_launch import FileLimits, QemuHost, launch
from atelier.drivers.vmm.qemu_migration import load_state, send_state, wait_until
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.drivers.vmm.run_folder import RunFolder
from atelier.host import processes
from atelier.host.files import free_bytes, refusal_as_error, sync_folder
from atelier.host.piped_file import piped_file
from atelier.host.unconnected_tap import unconnected_tap
from atelier.model.errors import DiskFullError, VmmError
from atelier.model.machine import MachineSpec, MemoryImage, MemoryStream

BAKING = "bake-"
"""What stands before the id in a baking machine's process name."""

_LOAD_SECONDS = 600.0
_STATE_LIMIT_BYTES = 64 * 1024 * 1024
_CONSOLE_LIMIT_BYTES = 1024 * 1024
_FULL_BYTES = 16 * 1024 * 1024
_MIB = 1024 * 1024


async def bake_image(host: QemuHost, stream: MemoryStream, spec: MachineSpec, image: MemoryImage) -> None:
    """As ``VmmDriver.bake``, in a run directory that is there and with no process of this name."""
    with _memory_file(image.memory, spec.memory_mib * _MIB) as memory:
        async with piped_file(_unfinished(image.state), limit_bytes=_STATE_LIMIT_BYTES, mode=0o400) as state:
            async with _card_for(spec) as network_descriptor:
                identity = await launch(
                    host,
                    BAKING + spec.sandbox_id,
                    spec,
                    disks=[EmptyDisk(disk.serial, disk.read_only) for disk in (spec.root, spec.tools)],
                    limits=FileLimits(_CONSOLE_LIMIT_BYTES, _CONSOLE_LIMIT_BYTES),
                    memory=OpenMemory(memory.descriptor, shared=True),
                    network_descriptor=network_descriptor,
                    boots=False,
                )
            try:
                socket = RunFolder(spec.run_directory).control_socket
                async with await QmpConnection.open(socket, timeout_seconds=_LOAD_SECONDS) as control:
                    await load_state(control, stream.path, with_memory=True)
                    await send_state(control, state.write_end, with_memory=False, pause_before_switchover=False)
                    state.handed_over()
                    await wait_until(control, "completed")
                    await state.end()
            except VmmError as error:
                # Memory is written through a map: a full disk shows as the machine's sudden end.
                if free_bytes(image.memory.parent) < _FULL_BYTES:
                    raise DiskFullError(
                        f"no space left while writing {image.memory}", hint="free some space, then try again"
                    ) from error
                raise
            finally:
                # Also where it went well: from here on nobody writes to the memory file.
                await asyncio.shield(processes.kill_and_wait(identity))
            await asyncio.to_thread(memory.keep)
            await state.keep(image.state)


@dataclass(slots=True)
class _MemoryFile:
    path: Path
    descriptor: int

    def keep(self) -> None:
        """On the disk, under its name, the manager's own and for reading only."""
        with refusal_as_error(f"writing {self.path}"):
            os.fchown(self.descriptor, os.geteuid(), os.getegid())
            os.fchmod(self.descriptor, 0o400)
            os.fsync(self.descriptor)
            _unfinished(self.path).replace(self.path)
            sync_folder(self.path.parent)


@contextmanager
def _memory_file(path: Path, size_bytes: int) -> Generator[_MemoryFile]:
    """A new file of this size, one hole; it goes with the block unless it was kept. Nobody but the VMM that it is
    handed to opens it meanwhile: its folder is the manager's own."""
    unfinished = _unfinished(path)
    with refusal_as_error(f"making {unfinished}"):
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
        yield _MemoryFile(path, descriptor)
    finally:
        os.close(descriptor)
        unfinished.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".new")


@asynccontextmanager
async def _card_for(spec: MachineSpec) -> AsyncGenerator[int | None]:
    """A saved card is only loaded into one that can do the same, which a TAP decides."""
    if spec.network.kind != "tap":
        yield None
        return
    async with unconnected_tap() as descriptor:
        yield descriptor
