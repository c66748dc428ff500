"""A file written through a pipe by somebody who never holds it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from atelier.host.piped_file import PipedFile, piped_file
from atelier.model.errors import HostError

LIMIT = 64 * 1024 * 1024
PATIENCE_SECONDS = 30


def _write(piped: PipedFile, *pieces: bytes) -> None:
    writer = os.dup(piped.write_end)
    piped.handed_over()
    with os.fdopen(writer, "wb", buffering=0) as file:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]


async def test_what_was_written_is_kept_under_its_name(tmp_path: Path) -> None:
    content, target = os.urandom(5_000_000), tmp_path / "kept"
    target.write_bytes(b"what was there before")
    async with piped_file(tmp_path / "new", limit_bytes=LIMIT, mode=0o400) as piped:
        await asyncio.to_thread(_write, piped, content)
        assert await piped.end() == len(content)
        await piped.keep(target)
    assert target.read_bytes() == content
    assert target.stat().st_mode & 0o777 == 0o400
    assert list(tmp_path.iterdir()) == [target]


async def test_what_is_not_kept_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with piped_file(tmp_path / "new", limit_bytes=LIMIT) as piped:
            await asyncio.to_thread(_write, piped, b"x" * 1000)
            raise KeyError
    assert list(tmp_path.iterdir()) == []


async def test_a_held_writer_waits_and_goes_on(tmp_path: Path) -> None:
    # More than the largest pipe takes.
    content = os.urandom(3_000_000)
    async with piped_file(tmp_path / "new", limit_bytes=LIMIT, held=True) as piped:
        writing = asyncio.create_task(asyncio.to_thread(_write, piped, content))
        await asyncio.sleep(0.3)
        assert not writing.done()
        piped.go_on()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await writing
            assert await piped.end() == len(content)
        assert (tmp_path / "new").read_bytes() == content


async def test_a_held_writer_is_let_through_by_and_by(tmp_path: Path) -> None:
    content, file, step = os.urandom(3_000_000), tmp_path / "new", 100_000
    async with piped_file(file, limit_bytes=LIMIT, held=True) as piped:
        writing = asyncio.create_task(asyncio.to_thread(_write, piped, content))
        async with asyncio.timeout(PATIENCE_SECONDS):
            for number in range(3):
                before = file.stat().st_size
                piped.let_through(step)
                while file.stat().st_size < before + step:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                assert file.stat().st_size == before + step, number
            piped.go_on()
            await writing
            assert await piped.end() == len(content)
        assert file.read_bytes() == content


async def test_a_writer_that_never_ends_is_left_alone(tmp_path: Path) -> None:
    async with piped_file(tmp_path / "new", limit_bytes=LIMIT) as piped:
        writer = os.dup(piped.write_end)
        os.write(writer, b"x")
    try:
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"nobody reads this")
    finally:
        os.close(writer)
    assert list(tmp_path.iterdir()) == []


async def test_too_much_is_refused_and_the_writer_learns_of_it(tmp_path: Path) -> None:
    async with piped_file(tmp_path / "new", limit_bytes=100_000) as piped:
        with pytest.raises(BrokenPipeError):
            await asyncio.to_thread(_write, piped, bytes(10_000_000))
        with pytest.raises(HostError) as refusal:
            await piped.end()
    assert refusal.value.code == "stream_too_long"
    assert list(tmp_path.iterdir()) == []


async def test_more_writers_at_once_than_the_loop_has_threads(tmp_path: Path) -> None:
    """Each waits; what they wait for takes one of the loop's threads."""
    held = [piped_file(tmp_path / str(number), limit_bytes=LIMIT) for number in range(64)]
    for each in held:
        await each.__aenter__()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await asyncio.to_thread(lambda: 1) == 1
    finally:
        for each in held:
            await each.__aexit__(None, None, None)


async def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(HostError) as refusal:
        async with piped_file(tmp_path / "absent" / "new", limit_bytes=LIMIT):
            pass
    assert refusal.value.code == "folder_missing"
