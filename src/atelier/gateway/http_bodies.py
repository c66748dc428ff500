"""Carries the bodies of HTTP/1.1 messages from one connection to another, piece by piece: nothing gathers here.

Used by ``preview_exchange``. Chunked bodies are taken apart and put together again, so that nobody behind this sees a
chunk that is framed otherwise than it was understood here. Source: RFC 9112, section 7.1.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Final

from atelier.gateway.byte_stream import PIECE_BYTES, ByteStream
from atelier.gateway.http_head import Body

_LINE_MAX_BYTES: Final = 1024
_TRAILERS_MAX: Final = 64
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")


class BodyBroken(Exception):
    """It ended too early, or is framed as nobody may; where it came from is of no use any more."""


class BodyCarrier:
    """From ``source`` to ``sink``. ``read_seconds``: how long a piece may take to come (None: as long as it likes),
    ``write_seconds`` to go."""

    def __init__(self, source: ByteStream, sink: ByteStream, read_seconds: float | None, write_seconds: float) -> None:
        self._source = source
        self._sink = sink
        self._read_seconds = read_seconds
        self._write_seconds = write_seconds

    async def carry(self, body: Body, head: bytes = b"") -> None:
        """``head`` and the body behind it, until its end; ``sink`` gets it in the same framing.

        Raises BodyBroken, ConnectionError, TimeoutError."""
        left = body.length
        if 0 < left <= PIECE_BYTES:
            # One piece with its head, as most answers are: each write is a call of the kernel's.
            piece = await self._source.read(left, self._read_seconds)
            left -= len(piece)
            head += piece
        if head:
            await self._sink.write(head, self._write_seconds)
        if left:
            await self._carry_exactly(left)
        elif body.framing == "chunked":
            await self._carry_chunks()
        elif body.framing == "close":
            while piece := await self._source.read(PIECE_BYTES, self._read_seconds):
                await self._sink.write(piece, self._write_seconds)

    async def _carry_exactly(self, length: int) -> None:
        while length:
            piece = await self._source.read(length, self._read_seconds)
            if not piece:
                raise BodyBroken("the body ended too early")
            length -= len(piece)
            await self._sink.write(piece, self._write_seconds)

    async def _carry_chunks(self) -> None:
        while True:
            found = _CHUNK_LINE.fullmatch(await self._read_line())
            if found is None:
                raise BodyBroken("a chunk is malformed")
            size = int(found[1], 16)
            if size == 0:
                break
            self._sink.begin_writing(b"%x\r\n" % size)
            await self._carry_exactly(size)
            if await self._read_line() != b"\r\n":
                raise BodyBroken("a chunk is longer than it says")
            self._sink.begin_writing(b"\r\n")
        for _ in range(_TRAILERS_MAX):
            # Trailers go no further: nobody has looked at them.
            if await self._read_line() == b"\r\n":
                await self._sink.write(b"0\r\n\r\n", self._write_seconds)
                return
        raise BodyBroken("trailers without end")

    async def _read_line(self) -> bytes:
        try:
            return await self._source.read_until(b"\r\n", _LINE_MAX_BYTES, self._read_seconds)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise BodyBroken("the body ended too early, or a chunk is malformed") from error


async def splice(source: ByteStream, sink: ByteStream, on_piece: Callable[[], None]) -> None:
    """All that comes, until the end of ``source`` or a broken connection; ``on_piece`` is called for each piece."""
    while piece := await source.read(PIECE_BYTES):
        on_piece()
        await sink.write(piece, None)
