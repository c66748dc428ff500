"""Clones of a bare machine: saved, baked and restored by plain QMP, with nothing checked, recorded or synced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atelier.drivers.vmm.qemu_arguments import OpenMemory
from atelier.drivers.vmm.qemu_migration import load_state, run_on, send_state, stop_to_save, wait_until
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.host.sealed_memory import sealed_copy
from atelier.model.machine import DiskFile
from benchmarks.bare_machine import BareMachine, Ingredients, SavedSide, bare_machine
from benchmarks.bare_restore import RestoredMachine, chain_of, restored_machine
from benchmarks.direct_channel import DirectChannel

_MIB = 1024 * 1024
_START_SECONDS = 60.0


@contextlib.contextmanager
def cloned_machines(
    folder: Path,
    ingredients: Ingredients,
    parent: BareMachine,
    channel: DirectChannel,
    memory_mib: int,
    count: int,
    at_a_time: int,
) -> Generator[list[RestoredMachine]]:
    """``count`` guests that go on from where ``parent`` is now, as does the parent; each has answered a ``true``.
    ``channel`` is the parent's. All lies in ``folder``, which goes with the block."""
    folder.mkdir(mode=0o700)
    stream, memory, state, disk = (folder / name for name in ("stream", "memory", "state", "disk.qcow2"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        channel.ask("/atelier.v1.Control/Quiesce", {})
        asyncio.run(_save(parent, stream, disk))
        channel.ask("/atelier.v1.Control/Thaw", {})
        below, tools = chain_of(DiskFile(disk, "qcow2")), ingredients.boot.tools
        with _opened(memory, os.O_RDWR) as descriptor:
            os.ftruncate(descriptor, memory_mib * _MIB)
            saved = SavedSide(below, tools, OpenMemory(descriptor, shared=True))
            with bare_machine(folder / "bake", ingredients, saved=saved, memory_mib=memory_mib) as machine:
                asyncio.run(_bake(machine, stream, state))
        sealed = sealed_copy(memory)
        stack.callback(os.close, sealed)
        saved = SavedSide(below, tools, OpenMemory(sealed, shared=False))

        def clone(number: int) -> RestoredMachine:
            made = restored_machine(folder / f"clone-{number}", ingredients, saved, state, memory_mib)
            clone = stack.enter_context(made)
            clone.channel.run("/bin/true")
            return clone

        with ThreadPoolExecutor(at_a_time) as threads:
            clones = list(threads.map(clone, range(count)))
        yield clones


async def _save(machine: BareMachine, stream: Path, disk: Path) -> None:
    async with await QmpConnection.open(machine.folder.control_socket) as control:
        await stop_to_save(control)
        await _send(control, stream, with_memory=True)
        await asyncio.to_thread(shutil.copyfile, machine.overlay, disk)
        await run_on(control)


async def _bake(machine: BareMachine, stream: Path, state: Path) -> None:
    async with await QmpConnection.open(machine.folder.control_socket, timeout_seconds=_START_SECONDS) as control:
        await load_state(control, stream, with_memory=True)
        await _send(control, state, with_memory=False)


async def _send(control: QmpConnection, target: Path, *, with_memory: bool) -> None:
    await control.execute("migrate-set-parameters", {"max-bandwidth": 0})
    with _opened(target, os.O_WRONLY) as descriptor:
        await send_state(control, descriptor, with_memory=with_memory, pause_before_switchover=False)
    await wait_until(control, "completed")


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Generator[int]:
    """A new file."""
    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
