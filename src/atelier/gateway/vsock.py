"""Firecracker's end of a guest's vsock: a unix socket on which a line asks for a port of the guest.

Called by ``channel``. The VMM may be broken out of: what it answers is bounded, in bytes and in time.
Source: Firecracker docs/vsock.md.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Final

from atelier.host.unix_sockets import connect_exactly

_ANSWER_SECONDS: Final = 5.0
"""Firecracker itself gives a guest 2 s to accept."""
_ANSWER_MAX_BYTES: Final = 32


async def connect_to_port(vmm_socket: Path, port: int) -> socket.socket:
    """A connection to the guest's vsock ``port``, non-blocking. Raises OSError, as for a guest that does not listen yet:
    Firecracker hangs up then."""
    connection = await connect_exactly(vmm_socket)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await loop.sock_sendall(connection, b"CONNECT %d\n" % port)
            answer = b""
            while not answer.endswith(b"\n"):
                # Byte for byte: what follows the line is the guest's.
                received = await loop.sock_recv(connection, 1)
                answer += received
                if not received:
                    raise ConnectionRefusedError("the guest does not listen on its vsock")
                if len(answer) > _ANSWER_MAX_BYTES:
                    raise ConnectionError("the VMM's answer to CONNECT has no end")
        if not answer.startswith(b"OK "):
            raise ConnectionError("the VMM refused to connect to the guest")
    except BaseException:
        connection.close()
        raise
    return connection
