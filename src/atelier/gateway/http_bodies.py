"""Carries the bodies of HTTP/1.1 messages from one connection to another, piece by piece: nothing gathers here.

Used by ``preview_exchange``. Chunked bodies are taken apart and put together again, so that nobody behind this sees a
chunk that is framed otherwise than it was understood here. Source: RFC 9112, section 7.1.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final

from atelier.gateway.http_head import Body

PIECE_BYTES: Final = 128 * 1024
_LINE_MAX_BYTES: Final = 1024
_TRAILERS_MAX: Final = 64
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")


class BodyBroken(Exception):
    """It ended too early, or is framed as nobody may; where it came from is of no use any more."""


class _Carrier:
    """``read_seconds``: how long a piece may take to come (None: as long as it likes), ``write_seconds`` to go."""

    def __init__(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        read_seconds: float | None,
        write_seconds: float,
    ) -> None:
        self._source = source
        self._sink = sink
        self._read_seconds = read_seconds
        self._write_seconds = write_seconds

    async def copy(self, body: Body, head: bytes) -> None:
        if body.framing == "length" and 0 < body.length <= PIECE_BYTES:
            # One piece with its head, as most answers are: each write is a call of the kernel's.
            piece = await self._read(body.length)
            await self._write(head + piece)
            await self._copy_exactly(body.length - len(piece))
            return
        await self._write(head)
        if body.framing == "length":
            await self._copy_exactly(body.length)
        elif body.framing == "chunked":
            await self._copy_chunks()
        elif body.framing == "close":
            while piece := await self._read(PIECE_BYTES):
                await self._write(piece)

    async def _copy_exactly(self, length: int) -> None:
        while length:
            piece = await self._read(min(length, PIECE_BYTES))
            if not piece:
                raise BodyBroken("the body ended too early")
            length -= len(piece)
            await self._write(piece)

    async def _copy_chunks(self) -> None:
        while True:
            found = _CHUNK_LINE.fullmatch(await self._read_line())
            if found is None:
                raise BodyBroken("a chunk is malformed")
            size = int(found[1], 16)
            if size == 0:
                break
            self._sink.write(b"%x\r\n" % size)
            await self._copy_exactly(size)
            if await self._read_line() != b"\r\n":
                raise BodyBroken("a chunk is longer than it says")
            self._sink.write(b"\r\n")
        for _ in range(_TRAILERS_MAX):
            # Trailers go no further: nobody has looked at them.
            if await self._read_line() == b"\r\n":
                await self._write(b"0\r\n\r\n")
                return
        raise BodyBroken("trailers without end")

    async def _read_line(self) -> bytes:
        try:
            line = await self._in_time(self._source.readuntil(b"\r\n"))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise BodyBroken("the body ended too early, or a chunk is malformed") from error
        if len(line) > _LINE_MAX_BYTES:
            raise BodyBroken("a chunk is malformed")
        return line

    async def _read(self, at_most: int) -> bytes:
        return await self._in_time(self._source.read(at_most))

    async def _in_time(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        if self._read_seconds is None:
            return await reading
        async with asyncio.timeout(self._read_seconds):
            return await reading

    async def _write(self, piece: bytes) -> None:
        self._sink.write(piece)
        if self._sink.transport.get_write_buffer_size() or self._sink.transport.is_closing():
            async with asyncio.timeout(self._write_seconds):
                await self._sink.drain()


async def copy_body(
    body: Body,
    source: asyncio.StreamReader,
    sink: asyncio.StreamWriter,
    *,
    read_seconds: float | None,
    write_seconds: float,
    head: bytes = b"",
) -> None:
    """``head`` and the body behind it, until its end; ``sink`` gets it in the same framing. Raises BodyBroken, ConnectionError, TimeoutError when a piece
    takes longer than that to come (None: as long as it likes) or to go."""
    await _Carrier(source, sink, read_seconds, write_seconds).copy(body, head)


async def splice(source: asyncio.StreamReader, sink: asyncio.StreamWriter, on_piece: Callable[[], None]) -> None:
    """All that comes, until the end of ``source`` or a broken connection; ``on_piece`` is called for each piece."""
    while piece := await source.read(PIECE_BYTES):
        on_piece()
        sink.write(piece)
        await sink.drain()
