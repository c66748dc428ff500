"""Saves a running Firecracker machine into a stream, and makes an image of one.

The order: pause, ``snapshot/create``, what the disk's cache still holds is written, the caller freezes the disk, resume;
only then are the files taken out of the jail, so that the guest stands still for no longer than it must.

Called by the Firecracker driver. Source: Firecracker docs/snapshotting/snapshot-support.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from atelier.drivers.vmm.firecracker_api import FirecrackerApi
from atelier.drivers.vmm.firecracker_config import SnapshotCreateParams, Vm
from atelier.drivers.vmm.firecracker_stream import append_state, read_parts
from atelier.drivers.vmm.interface import SavingMoment
from atelier.drivers.vmm.privileges import VmmPrivileges
from atelier.host.file_copies import copy_file
from atelier.host.files import refusal_as_error, sync_folder, write_atomically
from atelier.host.threads import run_in_thread
from atelier.model.errors import AtelierError, HostError, VmmError
from atelier.model.jail import JAIL_SAVED_MEMORY, JAIL_SAVED_STATE
from atelier.model.machine import MemoryImage, MemoryStream, SavedMachine

_SAVED = (JAIL_SAVED_MEMORY, JAIL_SAVED_STATE)
_ABANDON_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RunningMachine:
    """``api`` waits long enough for all of the memory to be written."""

    machine_id: str
    api: FirecrackerApi
    privileges: VmmPrivileges


async def save_machine(
    machine: RunningMachine,
    target: Path,
    *,
    before_stop: SavingMoment | None,
    at_stop: SavingMoment | None,
    afterwards: SavingMoment | None,
) -> SavedMachine:
    """As ``VmmDriver.save``."""
    if not target.parent.is_dir():
        raise HostError(f"{target} cannot be made: there is no such folder", code="folder_missing")
    api, privileges = machine.api, machine.privileges
    # Also what a manager left that died while it was saving.
    await run_on(api)
    version = await api.version()
    unfinished = target.with_name(target.name + ".new")
    try:
        await privileges.add_files(machine.machine_id, _SAVED)
        if before_stop is not None:
            await before_stop()
        stopped_ms = await _stop_and_write(machine, at_stop, goes_on=afterwards is not None)
        if afterwards is not None:
            await afterwards()
        size_bytes = await _take(machine, unfinished)
        unfinished.replace(target)
        sync_folder(target.parent)
    except BaseException:
        # What went wrong is told already; a VMM that is gone runs nothing.
        with contextlib.suppress(AtelierError, TimeoutError):
            await asyncio.shield(_abandon(machine))
        unfinished.unlink(missing_ok=True)
        raise
    return SavedMachine(stopped_ms, size_bytes, version)


async def run_on(api: FirecrackerApi) -> None:
    """Let it run if it is paused. Raises VmmError for a machine that was never started."""
    state = await api.state()
    if state == "Paused":
        await api.patch(Vm("Resumed"))
    elif state != "Running":
        raise VmmError(f"the machine does not run: it is {state!r}", hint="start it first")


async def _stop_and_write(machine: RunningMachine, at_stop: SavingMoment | None, *, goes_on: bool) -> float:
    loop = asyncio.get_running_loop()
    stopped_at = loop.time()
    await machine.api.patch(Vm("Paused"))
    await machine.api.put(SnapshotCreateParams(f"/{JAIL_SAVED_MEMORY}", f"/{JAIL_SAVED_STATE}"))
    await machine.privileges.flush_disk(machine.machine_id)
    if at_stop is not None:
        await at_stop()
    if goes_on:
        await machine.api.patch(Vm("Resumed"))
    elif await machine.api.state() != "Paused":
        raise VmmError("the machine ran on while it was saved", hint="another program speaks to its API socket")
    return (loop.time() - stopped_at) * 1000


async def _take(machine: RunningMachine, unfinished: Path) -> int:
    """The two files as one, and its size."""
    unfinished.unlink(missing_ok=True)
    await machine.privileges.take_file(machine.machine_id, JAIL_SAVED_STATE, unfinished)
    state = unfinished.read_bytes()
    unfinished.unlink()
    await machine.privileges.take_file(machine.machine_id, JAIL_SAVED_MEMORY, unfinished)
    return await asyncio.to_thread(append_state, unfinished, state)


async def _abandon(machine: RunningMachine) -> None:
    # Whoever gave up is to be free again, whatever the VMM says.
    async with asyncio.timeout(_ABANDON_SECONDS):
        try:
            await run_on(machine.api)
        finally:
            await machine.privileges.remove_files(machine.machine_id, _SAVED)


async def bake_image(stream: MemoryStream, image: MemoryImage, memory_bytes: int) -> None:
    """As ``VmmDriver.bake``: no machine is needed, what Firecracker wrote is what it maps."""
    try:
        parts = await asyncio.to_thread(read_parts, stream.path)
    except (OSError, ValueError) as error:
        raise _unbaked(stream, str(error)) from error
    if parts.memory_bytes != memory_bytes:
        raise _unbaked(stream, f"it holds {parts.memory_bytes} bytes of memory instead of {memory_bytes}")
    unfinished = image.memory.with_name(image.memory.name + ".new")

    def copy(given_up: threading.Event) -> None:
        with refusal_as_error(f"writing {unfinished}"):
            unfinished.unlink(missing_ok=True)
            copy_file(stream.path, unfinished, mode=0o600, given_up=given_up)
            os.truncate(unfinished, memory_bytes)
            unfinished.chmod(0o400)
            descriptor = os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            unfinished.replace(image.memory)
            sync_folder(image.memory.parent)

    try:
        # Never the stream's own blocks under another name: a VMM may have that file open still.
        await run_in_thread(copy)
    finally:
        unfinished.unlink(missing_ok=True)
    write_atomically(image.state, parts.state, mode=0o400)
    sync_folder(image.state.parent)


def _unbaked(stream: MemoryStream, why: str) -> VmmError:
    return VmmError(
        f"the saved machine {stream.path} could not be baked: {why}",
        code="bake_failed",
        hint="it is damaged, or another VMM's",
    )
