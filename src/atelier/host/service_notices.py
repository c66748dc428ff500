"""Tells the host's service manager how a program is getting on: ready, alive, about to end. Nothing where none has asked.

Called by the programs that run as services. Source: sd_notify(3), systemd.service(5): Type=notify, WatchdogSec.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket


def tell_service_manager(*states: str) -> None:
    """``READY=1``, ``STOPPING=1``, ``WATCHDOG=1``. One that cannot be reached is no reason to fail."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        sender.sendto("\n".join(states).encode(), address)


def watchdog_seconds() -> float | None:
    """How often this process has to say that it is alive, lest it is ended; None: nobody waits for that."""
    text = os.environ.get("WATCHDOG_USEC", "")
    if not text.isdecimal() or not int(text) or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 1e6


async def stay_alive() -> None:
    """Say so for as long as the event loop runs; ends at once where nobody waits for it."""
    if (seconds := watchdog_seconds()) is None:
        return
    while True:
        tell_service_manager("WATCHDOG=1")
        await asyncio.sleep(seconds / 3)
