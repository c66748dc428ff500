"""Saves a running QEMU machine into a stream.

Under KVM memory goes out first, while the guest runs; then the guest is quiesced, the machine stops, its disks are
switched, and the little that is left follows. In software emulation the guest is quiesced and the machine stopped before
anything is sent: QEMU 7.2 loses a store now and then that an emulated processor makes while its memory is read (measured:
one restored guest of 65 found its memory changed).

Called by the QEMU driver. Quiescing takes a guest's answer, so QEMU must not come to the end of the memory before: the
pipe is held for that long while enough of it is left. A machine that could not be saved runs as before.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

from atelier.drivers.vmm.qemu_migration import (
    query_progress,
    query_status,
    query_version,
    run_on,
    send_state,
    stop_to_save,
    wait_until,
)
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.host.piped_file import PipedFile, piped_file
from atelier.model.errors import VmmError
from atelier.model.machine import SavedMachine

Callback = Callable[[], Awaitable[None]]

_MIB = 1024 * 1024
_POLL_SECONDS = 0.003
_LITTLE_LEFT_BYTES = (64 * _MIB, 128 * _MIB)
"""A quarter of the memory, within these. A held pipe (64 KiB) and QEMU's buffer still take 45 MiB of pages of zeros,
9 bytes each."""
_FIRST_STOP_MS, _LONGEST_STOP_MS = 50, 2_000_000
"""How long the last part may take to send: at first; and, doubled again and again, at last whatever it takes."""
_PATIENCE_SECONDS = 0.25
_ABANDON_SECONDS = 30.0


async def save_machine(
    control: QmpConnection,
    target: Path,
    *,
    before_stop: Callback | None,
    at_stop: Callback | None,
    afterwards: Callback | None,
) -> SavedMachine:
    """As ``VmmDriver.save``."""
    # Also what a manager left that died while it was saving.
    await run_on(control)
    status = await query_status(control)
    if status != "running":
        raise VmmError(f"the machine cannot be saved: it does not run ({status})", hint="free some space on the host")
    memory_bytes = await _memory_bytes(control)
    if not await may_send_while_it_runs(control):
        async with _stream(control, target, memory_bytes) as stream:
            if before_stop is not None:
                await before_stop()
            stopped_at = asyncio.get_running_loop().time()
            await stop_to_save(control)
            await _begin(control, stream)
            return await _finish(control, stream, target, at_stop, afterwards, stopped_at)
    async with _stream(control, target, memory_bytes) as stream:
        await _begin(control, stream)
        in_time = before_stop is None or await _quiesce(control, stream, memory_bytes, before_stop)
        if in_time:
            return await _finish(control, stream, target, at_stop, afterwards)
    # The guest had little to send and stopped before it could be quiesced; it ran on and is quiet now.
    async with _stream(control, target, memory_bytes) as stream:
        await _begin(control, stream)
        return await _finish(control, stream, target, at_stop, afterwards)


@asynccontextmanager
async def _stream(control: QmpConnection, target: Path, memory_bytes: int) -> AsyncGenerator[PipedFile]:
    """A file for the stream. Unless the block ends well the machine runs on, and no file stays."""
    # A busy guest's pages are sent again and again; a VMM gone wild must not fill the disk.
    limit_bytes = 4 * memory_bytes + 1024 * _MIB
    async with piped_file(target.with_name(target.name + ".new"), limit_bytes=limit_bytes) as stream:
        try:
            yield stream
        except BaseException:
            # What went wrong is told already; a VMM that is gone runs nothing.
            with contextlib.suppress(VmmError, TimeoutError):
                await asyncio.shield(_abandon(control, stream))
            raise


async def _abandon(control: QmpConnection, stream: PipedFile) -> None:
    # A QEMU that waits for room in the pipe learns of nothing else.
    stream.go_on()
    # Whoever gave up is to be free again, whatever the VMM says.
    async with asyncio.timeout(_ABANDON_SECONDS):
        await run_on(control)


async def _begin(control: QmpConnection, stream: PipedFile) -> None:
    await control.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 1})
    await send_state(control, stream.write_end, with_memory=True, pause_before_switchover=True)
    stream.handed_over()


async def _quiesce(control: QmpConnection, stream: PipedFile, memory_bytes: int, before_stop: Callback) -> bool:
    """Await ``before_stop`` when little is left to send; False if the machine stopped before, and runs again."""
    lowest, highest = _LITTLE_LEFT_BYTES
    little_bytes = min(max(memory_bytes // 4, lowest), highest)
    while True:
        progress = await query_progress(control)
        if progress.status == "pre-switchover":
            await run_on(control)
            await before_stop()
            return False
        if not progress.under_way:
            await _raise_failure(stream, progress.error)
        if progress.remaining_bytes is not None and progress.remaining_bytes <= little_bytes:
            break
        await asyncio.sleep(_POLL_SECONDS)
    stream.hold()
    quiescing = asyncio.ensure_future(before_stop())
    try:
        in_time = True
        while not (await asyncio.wait([quiescing], timeout=_PATIENCE_SECONDS))[0]:
            if in_time and (await query_progress(control)).status == "pre-switchover":
                await run_on(control)
                in_time = False
        await quiescing
    finally:
        quiescing.cancel()
        await asyncio.wait([quiescing])
        stream.go_on()
    return in_time


async def _finish(
    control: QmpConnection,
    stream: PipedFile,
    target: Path,
    at_stop: Callback | None,
    afterwards: Callback | None,
    stopped_at: float | None = None,
) -> SavedMachine:
    """``stopped_at``: when it was stopped before, on the event loop's clock."""
    await _switch_over(control, stream)
    if at_stop is not None:
        await at_stop()
    await control.execute("migrate-continue", {"state": "pre-switchover"})
    try:
        progress = await wait_until(control, "completed")
    except VmmError as error:
        await _raise_failure(stream, error.message)
    stopped_ms = float(progress.stopped_ms)
    if stopped_at is not None:
        stopped_ms = (asyncio.get_running_loop().time() - stopped_at) * 1000
    size_bytes = await stream.end()
    if afterwards is not None:
        await run_on(control)
        await afterwards()
    await stream.keep(target)
    return SavedMachine(stopped_ms, size_bytes, await query_version(control))


async def _switch_over(control: QmpConnection, stream: PipedFile) -> None:
    """Until the machine stands still with its disks still open."""
    longest_ms = _FIRST_STOP_MS
    loop = asyncio.get_running_loop()
    while True:
        await control.execute("migrate-set-parameters", {"downtime-limit": longest_ms})
        deadline = loop.time() + _PATIENCE_SECONDS
        while loop.time() < deadline:
            progress = await query_progress(control)
            if progress.status == "pre-switchover":
                return
            if not progress.under_way:
                await _raise_failure(stream, progress.error)
            await asyncio.sleep(_POLL_SECONDS)
        longest_ms = min(2 * longest_ms, _LONGEST_STOP_MS)


async def _raise_failure(stream: PipedFile, reason: str) -> NoReturn:
    """A full disk is told as such, not as the broken pipe that QEMU saw."""
    await stream.end()
    raise VmmError(f"the machine could not be saved: {reason}")


async def may_send_while_it_runs(control: QmpConnection) -> bool:
    return (await control.query("query-kvm")).get("enabled") is True


async def _memory_bytes(control: QmpConnection) -> int:
    size_bytes = (await control.query("query-memory-size-summary")).get("base-memory")
    if not isinstance(size_bytes, int):
        raise VmmError("QEMU does not say how much memory the machine has")
    return size_bytes
