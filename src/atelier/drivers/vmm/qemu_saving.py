"""Saves a running QEMU machine into a stream.

All of its memory is sent once while it runs; then the guest is quiesced, the machine stops, its disks are switched, and
what the guest has written to meanwhile follows. QEMU loses stores when it takes note of them (``syncs``) while emulated
processors run, so it does that while the machine stands still, and never else: the machine is stopped for a moment in
which the sending begins, and at the end (docs/adr/0014).

Called by the QEMU driver. Quiescing takes a guest's answer, so QEMU must not come to the end of the memory before: the
pipe is held for that long while enough of it is left. If it did all the same, the quiet guest's machine is stopped and
then all is sent; likewise where there is nothing to quiesce. A machine that could not be saved runs as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

from atelier.drivers.vmm.qemu_migration import (
    Progress,
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
_POLL_SECONDS = 0.002
_LITTLE_LEFT_BYTES = (64 * _MIB, 128 * _MIB)
"""A quarter of the memory, within these. A held pipe (64 KiB) and QEMU's buffer still take 45 MiB of pages of zeros,
9 bytes each."""
_LEAST_LEFT_BYTES = 8 * _MIB
_PAGE_BYTES, _ZERO_PAGE_BYTES = 4096, 9
"""The latter: of a page of zeros in the stream."""
_CAUTION = 16
_STEP_SECONDS = 0.002
_ABANDON_SECONDS = 30.0

_log = logging.getLogger(__name__)


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
    loop = asyncio.get_running_loop()
    if before_stop is not None:
        async with _stream(control, target, memory_bytes, held=True) as stream:
            if await _send_while_it_runs(control, stream, memory_bytes, before_stop):
                stopped_at = loop.time()
                await control.execute("stop")
                progress = await query_progress(control)
                if progress.syncs == 1:
                    return await _finish(control, stream, target, at_stop, afterwards, stopped_at)
        _log.warning("a machine's memory was sent before its guest stood still: it is stopped and sent once more")
        await run_on(control)
    async with _stream(control, target, memory_bytes) as stream:
        stopped_at = loop.time()
        await _stop_and_begin(control, stream)
        return await _finish(control, stream, target, at_stop, afterwards, stopped_at)


@asynccontextmanager
async def _stream(
    control: QmpConnection, target: Path, memory_bytes: int, *, held: bool = False
) -> AsyncGenerator[PipedFile]:
    """A file for the stream. Unless the block ends well the machine runs on, and no file stays."""
    # At most each page twice, and a VMM gone wild must not fill the disk.
    limit_bytes = 4 * memory_bytes + 1024 * _MIB
    async with piped_file(target.with_name(target.name + ".new"), limit_bytes=limit_bytes, held=held) as stream:
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


async def _stop_and_begin(control: QmpConnection, stream: PipedFile) -> None:
    """Have the machine stand still, and begin to send it. QEMU comes to the end by itself when all memory is sent, and
    not before: with any other limit it would take note of what was written to when little is left."""
    await control.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 0})
    await stop_to_save(control)
    await send_state(control, stream.write_end, with_memory=True, pause_before_switchover=True)
    stream.handed_over()


async def _send_while_it_runs(
    control: QmpConnection, stream: PipedFile, memory_bytes: int, before_stop: Callback
) -> bool:
    """Until little is left to send, and ``before_stop`` has come to its end: the machine runs, and the stream is held.
    False if all was sent before; the machine runs again then, and ``before_stop`` was awaited too."""
    lowest, highest = _LITTLE_LEFT_BYTES
    little_bytes = min(max(memory_bytes // 4, lowest), highest)
    await _stop_and_begin(control, stream)
    await _wait(control, stream, lambda progress: progress.syncs > 0)
    await control.execute("cont")
    # All of it, but never so wide that it cannot be held.
    stream.let_through(2 * memory_bytes)
    await _wait(control, stream, lambda progress: progress.remaining_bytes <= little_bytes)
    stream.let_through(0)
    quiescing = asyncio.ensure_future(before_stop())
    try:
        in_time = await _send_more_until(quiescing, control, stream)
        await quiescing
    finally:
        quiescing.cancel()
        await asyncio.wait([quiescing])
    return in_time


async def _send_more_until(quiescing: asyncio.Future[None], control: QmpConnection, stream: PipedFile) -> bool:
    """Send of what is left as much as is safe meanwhile. False, and the machine runs, if that was too much."""
    page_bytes, let_through, before = _ZERO_PAGE_BYTES, 0, 0
    while not quiescing.done():
        progress = await _progress(control, stream)
        if progress.status == "pre-switchover":
            # A machine that stands still would never answer.
            stream.go_on()
            await run_on(control)
            return False
        left = progress.remaining_bytes
        if let_through and left < before:
            # What such a page took of late, and by far not so much: there may be more zeros.
            page_bytes = let_through * _PAGE_BYTES // (before - left) // _CAUTION
        page_bytes = max(page_bytes, _ZERO_PAGE_BYTES)
        let_through, before = max(left - _LEAST_LEFT_BYTES, 0) // _PAGE_BYTES * page_bytes, left
        if let_through:
            stream.let_through(let_through)
        await asyncio.wait([quiescing], timeout=_STEP_SECONDS)
    return True


async def _finish(
    control: QmpConnection,
    stream: PipedFile,
    target: Path,
    at_stop: Callback | None,
    afterwards: Callback | None,
    stopped_at: float,
) -> SavedMachine:
    """The machine stands still, since ``stopped_at`` on the event loop's clock."""
    stream.go_on()
    # QEMU goes on to send meanwhile, and lets the disks go only after it was told to continue.
    if at_stop is not None:
        await at_stop()
    await _wait(control, stream, lambda progress: progress.status == "pre-switchover")
    await control.execute("migrate-continue", {"state": "pre-switchover"})
    try:
        await wait_until(control, "completed")
    except VmmError as error:
        await _raise_failure(stream, error.message)
    stopped_ms = (asyncio.get_running_loop().time() - stopped_at) * 1000
    if afterwards is not None:
        # All of the machine is sent: what is asked of the guest may be under way to it before it runs.
        thawing = asyncio.ensure_future(afterwards())
        try:
            await control.execute("cont")
            stopped_ms = (asyncio.get_running_loop().time() - stopped_at) * 1000
            await thawing
        finally:
            thawing.cancel()
            await asyncio.wait([thawing])
    size_bytes = await stream.end()
    await stream.keep(target)
    return SavedMachine(stopped_ms, size_bytes, await query_version(control))


async def _wait(control: QmpConnection, stream: PipedFile, reached: Callable[[Progress], bool]) -> None:
    while True:
        if reached(await _progress(control, stream)):
            return
        await asyncio.sleep(_POLL_SECONDS)


async def _progress(control: QmpConnection, stream: PipedFile) -> Progress:
    """Raises VmmError if the machine is being sent no more."""
    progress = await query_progress(control)
    if not progress.under_way:
        await _raise_failure(stream, progress.error)
    return progress


async def _raise_failure(stream: PipedFile, reason: str) -> NoReturn:
    """A full disk is told as such, not as the broken pipe that QEMU saw."""
    stream.go_on()
    await stream.end()
    raise VmmError(f"the machine could not be saved: {reason}")


async def _memory_bytes(control: QmpConnection) -> int:
    size_bytes = (await control.query("query-memory-size-summary")).get("base-memory")
    if not isinstance(size_bytes, int):
        raise VmmError("QEMU does not say how much memory the machine has")
    return size_bytes
