"""The guest channel over a socket that listens: vsock, where the VMM is Firecracker; a unix socket in tests.

Called by ``channel``. The host has one connection at a time, and the newest counts: of those before a snapshot the host
may know nothing any more. Listening sockets outlive a snapshot, connections do not.
Source: vsock(7); Firecracker docs/vsock.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

from atelier.guest_protocol import GUEST_CHANNEL_VSOCK_PORT

VSOCK: Final = "vsock"
"""In place of a device's path."""

_HOST_CID: Final = 2
_DEVICES: Final = "/sys/bus/virtio/devices"
_VSOCK_DEVICE: Final = 19
"""Source: Virtual I/O Device (VIRTIO) 1.2, device types."""

Serve = Callable[[int], Awaitable[bool]]
"""Serves a connection, by its descriptor, until either side ends it."""


def has_vsock() -> bool:
    """Whether this machine has a virtio vsock, so that its host speaks to it there."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(_DEVICES):
            with contextlib.suppress(OSError, ValueError), open(f"{_DEVICES}/{name}/device", encoding="ascii") as file:
                if int(file.read(), 16) == _VSOCK_DEVICE:
                    return True
    return False


def is_host(address: Any) -> bool:
    """Whether a vsock's peer is the host: processes of the guest itself may connect as well."""
    return address[0] == _HOST_CID


async def serve_vsock(serve: Serve) -> None:
    """For ever. Raises OSError where there is no vsock."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        listener.bind((socket.VMADDR_CID_ANY, GUEST_CHANNEL_VSOCK_PORT))
        await serve_connections(listener, serve, is_host)


async def serve_connections(listener: socket.socket, serve: Serve, is_allowed: Callable[[Any], bool]) -> None:
    """Serve whoever connects, for ever, one after the other: a new connection ends the one before."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    listener.listen(4)
    connection: socket.socket | None = None
    serving: asyncio.Task[None] | None = None
    try:
        while True:
            accepted, address = await loop.sock_accept(listener)
            if not is_allowed(address):
                print(f"guest channel: {address} is not the host", file=sys.stderr)
                accepted.close()
                continue
            if connection is not None and serving is not None:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                await serving
            connection = accepted
            serving = loop.create_task(_serve_one(accepted, serve))
    finally:
        if serving is not None:
            serving.cancel()


async def _serve_one(connection: socket.socket, serve: Serve) -> None:
    with connection:
        connection.setblocking(False)
        await serve(connection.fileno())
