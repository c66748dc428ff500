"""Ends the guest in order: ask the processes, end them, write everything to disk, then have the kernel stop.

Called by ``control``. It restarts rather than powers off: every VMM here is started so that a restart ends it, and the
smallest virtual machines have no way to power off.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Final

from atelier.guest_agent.quiesce import Quiesce

_ANSWER_SECONDS: Final = 0.1
_TERM_SECONDS: Final = 2.0
_REMOUNT_SECONDS: Final = 0.3
# Source: Linux include/uapi/linux/reboot.h.
_RB_AUTOBOOT: Final = 0x01234567

_ending: asyncio.Task[None] | None = None


def begin(quiesce: Quiesce) -> None:
    """Start the end, and return at once, so that the request can still be answered. A second call changes nothing,
    unless the first one failed."""
    global _ending
    if _ending is None or _ending.done():
        _ending = asyncio.get_running_loop().create_task(_end(quiesce))


async def _end(quiesce: Quiesce) -> None:
    await asyncio.sleep(_ANSWER_SECONDS)
    # Nobody can be ended, and nothing written, while the guest stands still.
    await quiesce.end()
    if os.path.isdir("/run/systemd/system"):
        os.kill(1, signal.SIGRTMIN + 5)  # systemd: start reboot.target. Source: systemd(1)
        return
    for number, pause_seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, 0.1)):
        try:
            os.kill(-1, number)  # everybody but PID 1 and the agent itself
        except ProcessLookupError:
            break
        await _until_alone(pause_seconds)
    os.sync()
    _remount_read_only()
    await asyncio.sleep(_REMOUNT_SECONDS)
    import ctypes

    ctypes.CDLL(None).reboot(_RB_AUTOBOOT)


def _remount_read_only() -> None:
    # Everything is on disk already: a kernel that cannot do this has its journal replayed at the next boot.
    with contextlib.suppress(OSError), open("/proc/sysrq-trigger", "wb", buffering=0) as trigger:
        trigger.write(b"u")


async def _until_alone(limit_seconds: float) -> None:
    """Wait until no process but PID 1, this one and kernel threads is left, at most ``limit_seconds``."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + limit_seconds
    own = (1, os.getpid())
    while loop.time() < limit:
        if not any(name.isdigit() and int(name) not in own and _has_program(name) for name in os.listdir("/proc")):
            return
        await asyncio.sleep(0.05)


def _has_program(pid: str) -> bool:
    """False for kernel threads, the ended and the gone: they have no command line."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as content:
            return bool(content.read(1))
    except OSError:
        return False
