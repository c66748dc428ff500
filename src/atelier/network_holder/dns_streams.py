"""DNS messages over TCP: each behind its length. Source: RFC 1035, section 4.2.2."""

from __future__ import annotations

import asyncio
import socket
import struct


async def send_message(connection: socket.socket, wire: bytes) -> None:
    """Raises OSError."""
    await asyncio.get_running_loop().sock_sendall(connection, struct.pack("!H", len(wire)) + wire)


async def read_message(connection: socket.socket) -> bytes:
    """Raises OSError, EOFError."""
    return await _read_exactly(connection, int.from_bytes(await _read_exactly(connection, 2)))


async def _read_exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        piece = await asyncio.get_running_loop().sock_recv(connection, size - len(received))
        if not piece:
            raise EOFError
        received += piece
    return received
