"""Unix sockets in folders that a VMM's user may change: reached as they are, never through a link.

Called by the gateway and by the Firecracker driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def exact_socket(path: Path) -> Generator[str]:
    """A name of this very socket for as long as the block runs, at most 107 bytes long: its folder may belong to a VMM's
    uid, which could have put a link there that leads to a socket of somebody else's. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no socket")
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


async def connect_exactly(path: Path) -> socket.socket:
    """Connected, non-blocking and the caller's. Raises OSError."""
    with exact_socket(path) as name:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(connection, name)
        except BaseException:
            connection.close()
            raise
    return connection
