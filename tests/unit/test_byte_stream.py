"""A preview's connection as it is read and written: limits of time and size, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from atelier.gateway.byte_stream import PIECE_BYTES, ByteStream


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[ByteStream, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A stream, and both ways of its other side."""
    ours, theirs = socket.socketpair()
    _, stream = await asyncio.get_running_loop().create_unix_connection(ByteStream, sock=ours)
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    try:
        yield stream, reader, writer
    finally:
        stream.abort()
        writer.close()


async def test_what_came_is_read_in_pieces_until_the_end() -> None:
    async with connected() as (stream, _, writer):
        writer.write(b"one\r\ntwo")
        assert await stream.read_until(b"\r\n", 100) == b"one\r\n"
        assert await stream.read(2) == b"tw"
        assert not stream.is_usable, "something came that nobody has read"
        assert await stream.read(100) == b"o"
        assert stream.is_usable
        writer.write(b"three\r")
        waiting = asyncio.create_task(stream.read_until(b"\r\n", 100))
        await asyncio.sleep(0.01)
        writer.write(b"\nrest")
        assert await waiting == b"three\r\n"
        writer.close()
        with pytest.raises(asyncio.IncompleteReadError) as ended:
            await stream.read_until(b"\r\n", 100)
        assert ended.value.partial == b"rest"
        assert await stream.read(100) == b"rest"
        assert await stream.read(100) == b""
        assert not stream.is_usable


@pytest.mark.parametrize("sent", [b"a" * 100, b"a" * 99 + b"\r\n", b"a" * 1000 + b"\r\n"])
async def test_a_line_that_is_too_long(sent: bytes) -> None:
    async with connected() as (stream, _, writer):
        writer.write(sent)
        with pytest.raises(asyncio.LimitOverrunError):
            await stream.read_until(b"\r\n", 100)
    async with connected() as (stream, _, writer):
        writer.write(b"a" * 98 + b"\r\n")
        assert len(await stream.read_until(b"\r\n", 100)) == 100


async def test_whoever_takes_too_long_and_whoever_just_does_not() -> None:
    async with connected() as (stream, _, writer):
        with pytest.raises(TimeoutError):
            await stream.read(10, seconds=0.05)

        async def trickle() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        with pytest.raises(TimeoutError):
            # It is the whole that has to come in time.
            await stream.read_until(b"\n", 10_000, seconds=0.2)
        trickling.cancel()
        # What was still under way, too.
        with contextlib.suppress(TimeoutError):
            while await stream.read(10_000, seconds=0.3):
                pass
        # A short limit after a long one is kept, and a long one is not cut by a short one before it.
        writer.write(b"a")
        assert await stream.read(1, seconds=60) == b"a"
        waiting = asyncio.create_task(stream.read(1, seconds=60))
        await asyncio.sleep(0)
        writer.write(b"b")
        assert await waiting == b"b"
        with pytest.raises(TimeoutError):
            await stream.read(1, seconds=0.05)
        waiting = asyncio.create_task(stream.read(1, seconds=2))
        await asyncio.sleep(0)
        writer.write(b"c")
        assert await waiting == b"c"
        waiting = asyncio.create_task(stream.read(1, seconds=60))
        await asyncio.sleep(2.2)
        assert not waiting.done()
        writer.write(b"d")
        assert await waiting == b"d"


async def test_who_is_not_read_is_held_and_who_does_not_read_holds() -> None:
    async with connected() as (stream, reader, writer):
        size = 20 * PIECE_BYTES
        writer.write(bytes(size))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.2)
        received = 0
        while received < size:
            piece = await stream.read(PIECE_BYTES)
            assert 0 < len(piece) <= PIECE_BYTES
            received += len(piece)
        with pytest.raises(TimeoutError):
            await stream.write(bytes(size), 0.05)
        waiting = asyncio.create_task(stream.write(b"end", 60))
        assert await reader.readexactly(size) == bytes(size)
        await waiting
        assert await reader.readexactly(3) == b"end"


async def test_one_that_breaks_tells_whoever_waits() -> None:
    async with connected() as (stream, _, writer):
        reading = asyncio.create_task(stream.read(10))
        writing = asyncio.create_task(stream.write(bytes(20 * PIECE_BYTES), 60))
        await asyncio.sleep(0.01)
        writer.transport.abort()
        read, written = await asyncio.gather(reading, writing, return_exceptions=True)
        assert read == b"" or isinstance(read, ConnectionError)
        assert isinstance(written, ConnectionError)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await stream.write(b"more", 60)
