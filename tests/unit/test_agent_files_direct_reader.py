"""Bodies that are poured straight out of a connection: framing in pieces of any size, errors, ends."""

from __future__ import annotations

import asyncio
import random

import pytest

from atelier.guest_agent.direct_reader import BodyIntake, DirectReader
from atelier.guest_protocol.connect import ConnectError

CONTENT = random.Random(7).randbytes(5000)


def chunked(content: bytes, sizes: list[int], ending: bytes = b"0\r\n\r\n") -> bytes:
    body, at = b"", 0
    for size in sizes:
        piece = content[at : at + size]
        body += b"%X;ext=1\r\n%b\r\n" % (len(piece), piece)
        at += size
    assert at >= len(content)
    return body + ending


BODIES = [
    (CONTENT, len(CONTENT)),
    (chunked(CONTENT, [1, 2, 4000, 997]), -1),
    (chunked(CONTENT, [5000], b"0\r\nTrailer: x\r\nOther: y\r\n\r\n"), -1),
]


@pytest.mark.parametrize(("body", "length"), BODIES)
@pytest.mark.parametrize("step", [1, 3, 100, 4096, 100_000])
@pytest.mark.parametrize("before", [0, 1, 50, 6000])
async def test_what_follows_the_body_stays(body: bytes, length: int, step: int, before: int) -> None:
    reader = DirectReader(limit=1 << 20)
    taken = bytearray()
    intake = BodyIntake(taken.extend, length)
    data = body + b"NEXT REQUEST"
    # Some of it had come before anybody wanted it.
    if before:
        reader.feed_data(data[:before])
    pouring = asyncio.create_task(reader.pour(intake))
    await asyncio.sleep(0)
    for start in range(before, len(data), step):
        scratch = bytearray(data[start : start + step])
        reader.feed_data(memoryview(scratch))
        scratch[:] = bytes(len(scratch))  # the channel uses its memory again
    await pouring
    assert bytes(taken) == CONTENT
    reader.feed_eof()
    assert await reader.read() == b"NEXT REQUEST"


@pytest.mark.parametrize(
    "body",
    [b"XYZ\r\n", b"\r\n", b"-5\r\n", b"5\r\nabcdeX\r\n", b"1" * 16 + b"\r\n", b"1" * 300, b"5\r\nabcde\r\n0\r\n" + b"a:b\r\n" * 200],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 7, 10_000])
async def test_broken_chunks(body: bytes, step: int) -> None:
    reader = DirectReader(limit=1 << 20)
    pouring = asyncio.create_task(reader.pour(BodyIntake(lambda piece: None, -1)))
    await asyncio.sleep(0)
    for start in range(0, len(body), step):
        reader.feed_data(body[start : start + step])
    with pytest.raises(ConnectError):
        await pouring


@pytest.mark.parametrize("early", [True, False])
async def test_a_connection_that_ends_or_fails(early: bool) -> None:
    for end, expected in (
        (DirectReader.feed_eof, ConnectionResetError),
        (lambda r: r.set_exception(BrokenPipeError()), BrokenPipeError),
    ):
        reader = DirectReader(limit=1 << 20)
        if early:
            end(reader)
        pouring = asyncio.create_task(reader.pour(BodyIntake(lambda piece: None, 10)))
        await asyncio.sleep(0)
        if not early:
            reader.feed_data(b"12345")
            end(reader)
        with pytest.raises(expected):
            await pouring


async def test_who_takes_may_fail_or_leave() -> None:
    def full(piece: memoryview) -> None:
        raise OSError(28, "No space left on device")

    reader = DirectReader(limit=1 << 20)
    pouring = asyncio.create_task(reader.pour(BodyIntake(full, 100)))
    await asyncio.sleep(0)
    reader.feed_data(b"abc")
    reader.feed_data(b"def")
    with pytest.raises(OSError, match="No space"):
        await pouring
    taken = bytearray()
    pouring = asyncio.create_task(reader.pour(BodyIntake(taken.extend, 100)))
    await asyncio.sleep(0)
    pouring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pouring
    assert bytes(taken) == b"def"
    reader.feed_data(b"later")
    reader.feed_eof()
    assert await reader.read() == b"later"


async def test_an_empty_body_is_there_at_once() -> None:
    reader = DirectReader(limit=1 << 20)
    reader.feed_data(b"x")
    await reader.pour(BodyIntake(lambda piece: None, 0))
    assert await reader.read(1) == b"x"
