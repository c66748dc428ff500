"""HTTP over a sandbox's guest channel: a unix socket on which ``CONNECT <port>`` opens a stream to that guest port.

Used by ``agent`` only, as the network backend of an httpcore connection pool; one pool per sandbox. Knows nothing of
what is asked of the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import httpcore

from atelier.guest_protocol import GUEST_AGENT_PORT

_READ_AHEAD_BYTES = 256 * 1024
_IDLE_CONNECTIONS_MAX = 4
_IDLE_SECONDS = 30.0

_SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]


class ChannelStream(httpcore.AsyncNetworkStream):
    """One stream to a port of the guest. ``read`` gives up to 256 KiB, where httpcore asks for 64 KiB: h11 takes any
    size, and each piece of a download costs the whole way through the application to the client once (about a
    sixth of the manager's CPU time)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            async with asyncio.timeout(timeout):
                return await self._reader.read(max(max_bytes, _READ_AHEAD_BYTES))
        except TimeoutError as error:
            raise httpcore.ReadTimeout(f"nothing came for {timeout:g} s") from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        try:
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()
        except TimeoutError as error:
            raise httpcore.WriteTimeout(f"nothing was taken for {timeout:g} s") from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.UnsupportedProtocol("the guest channel is no TLS connection")

    def get_extra_info(self, info: str) -> Any:
        # httpcore asks this of an idle connection; bytes or an end there mean that it is broken.
        if info == "is_readable":
            return self._reader.at_eof() or self._writer.is_closing()
        return None


class ChannelBackend(httpcore.AsyncNetworkBackend):
    """Opens streams to one guest, whatever host name the request bears."""

    def __init__(self, socket_path: Callable[[], Path], port: int = GUEST_AGENT_PORT) -> None:
        self._socket_path = socket_path
        self._port = port

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[_SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(str(self._socket_path()), limit=_READ_AHEAD_BYTES)
                writer.write(b"CONNECT %d\n" % self._port)
                answer = await reader.readline()
            if not answer.startswith(b"OK ") or not answer.endswith(b"\n"):
                raise httpcore.ConnectError("the guest channel is closed" if not answer else "the channel refused")
        except TimeoutError as error:
            self._abort(writer)
            raise httpcore.ConnectTimeout(f"the guest channel did not open within {timeout:g} s") from error
        except (OSError, ValueError) as error:
            # ValueError: readline found no line end within its limit.
            self._abort(writer)
            raise httpcore.ConnectError(str(error)) from error
        except BaseException:
            self._abort(writer)
            raise
        return ChannelStream(reader, writer)

    @staticmethod
    def _abort(writer: asyncio.StreamWriter | None) -> None:
        if writer is not None:
            writer.transport.abort()

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[_SocketOption] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.UnsupportedProtocol("only guests are connected to here")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def new_pool(socket_path: Callable[[], Path]) -> httpcore.AsyncConnectionPool:
    """The connections to one guest. As many as there are requests; a few idle ones are kept for half a minute."""
    return httpcore.AsyncConnectionPool(
        max_connections=None,
        max_keepalive_connections=_IDLE_CONNECTIONS_MAX,
        keepalive_expiry=_IDLE_SECONDS,
        network_backend=ChannelBackend(socket_path),
    )


async def in_big_pieces(chunks: AsyncIterator[bytes], piece_bytes: int) -> AsyncIterator[bytes]:
    """The same bytes in pieces of at least ``piece_bytes``, the last one excepted: in a guest under software emulation
    each piece costs as much as many kilobytes do."""
    held: list[bytes] = []
    held_bytes = 0
    async for chunk in chunks:
        if not chunk:
            continue
        held.append(chunk)
        held_bytes += len(chunk)
        if held_bytes >= piece_bytes:
            yield held[0] if len(held) == 1 else b"".join(held)
            held, held_bytes = [], 0
    if held:
        yield b"".join(held)
