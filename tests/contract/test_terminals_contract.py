"""Terminals that live on: one suite for the fake guests and for the real driver with a guest agent on this host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from test_guest_contract import BOX, Ground, ground, put

from atelier.model.errors import GuestError, NotFoundError
from atelier.model.guest import ProcessEnded, ProcessOutput, ProcessSpec, TerminalSize
from atelier.model.terminal import (
    TerminalEvent,
    TerminalJoined,
    TerminalLost,
    TerminalReplayed,
    TerminalResized,
    TerminalTitled,
)

__all__ = ["ground"]
_SIZE = TerminalSize(80, 24)


def spec(*arguments: str) -> ProcessSpec:
    return ProcessSpec(arguments, stdin=True, terminal=_SIZE)


async def output_until(events: AsyncIterator[TerminalEvent], wanted: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(30):
        async for event in events:
            if isinstance(event, ProcessOutput):
                seen += event.data
            if wanted in seen:
                return seen
    raise AssertionError(f"{wanted!r} did not come: {seen!r}")


async def event_of(events: AsyncIterator[TerminalEvent], kind: type) -> TerminalEvent:
    async with asyncio.timeout(30):
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError(f"no {kind.__name__} came")


async def test_two_viewers_see_the_same_and_a_later_one_what_was_before(ground: Ground) -> None:
    terminals = ground.driver.terminals
    opened = await terminals.open(BOX, spec("cat"))
    async with (
        terminals.attach(BOX, opened.id, _SIZE) as first,
        terminals.attach(BOX, opened.id, _SIZE) as second,
    ):
        await event_of(first, TerminalReplayed)
        await event_of(second, TerminalReplayed)
        await terminals.write(BOX, opened.id, b"one line\r")
        assert await output_until(first, b"one line\r\none line\r\n") == await output_until(
            second, b"one line\r\none line\r\n"
        )
        assert [each.viewers for each in await terminals.list(BOX)] == [2]
    async with terminals.attach(BOX, opened.id) as later:
        joined = await anext(later)
        assert isinstance(joined, TerminalJoined)
        assert joined.session.id == opened.id
        await output_until(later, b"one line\r\none line\r\n")
        await event_of(later, TerminalReplayed)
    await terminals.close(BOX, opened.id)
    assert await terminals.list(BOX) == []


async def test_the_size_is_that_of_the_smallest_window(ground: Ground) -> None:
    terminals = ground.driver.terminals
    opened = await terminals.open(BOX, spec("cat"))
    async with terminals.attach(BOX, opened.id, TerminalSize(120, 30)) as large:
        joined = await anext(large)
        assert isinstance(joined, TerminalJoined)
        assert joined.session.size == TerminalSize(120, 30)
        async with terminals.attach(BOX, opened.id, TerminalSize(100, 50)) as tall:
            await event_of(tall, TerminalJoined)
            assert await event_of(large, TerminalResized) == TerminalResized(TerminalSize(100, 30))
            await terminals.resize(BOX, opened.id, TerminalSize(90, 20), joined.viewer)
            assert await event_of(large, TerminalResized) == TerminalResized(TerminalSize(90, 20))
    await terminals.close(BOX, opened.id)


async def test_a_program_names_its_terminal_and_a_person_goes_before(ground: Ground) -> None:
    terminals = ground.driver.terminals
    opened = await terminals.open(BOX, spec("echo", "-n", "\x1b]2;from the program\x07"))
    async with terminals.attach(BOX, opened.id) as events:
        await event_of(events, ProcessEnded)
    (ended,) = await terminals.list(BOX)
    assert ended.title == "from the program"
    assert ended.ended is not None
    assert ended.ended.exit_code == 0
    assert (await terminals.rename(BOX, opened.id, "mine\n\x1b")).title == "mine"
    assert (await terminals.rename(BOX, opened.id, "")).title == "from the program"


async def test_a_new_title_reaches_who_looks(ground: Ground) -> None:
    terminals = ground.driver.terminals
    opened = await terminals.open(BOX, spec("cat"))
    async with terminals.attach(BOX, opened.id) as events:
        await event_of(events, TerminalReplayed)
        await terminals.rename(BOX, opened.id, "build")
        assert await event_of(events, TerminalTitled) == TerminalTitled("build")
    await terminals.close(BOX, opened.id)


async def test_who_does_not_read_holds_nobody_up_and_is_told_what_is_lost(ground: Ground) -> None:
    """The program ends although the viewer has taken nothing of its 8 MiB."""
    path = ground.folder + b"/long"
    lines = b"".join(b"%07d\n" % number for number in range(1024 * 1024))
    await put(ground, path, lines)
    terminals = ground.driver.terminals
    opened = await terminals.open(BOX, spec("cat", path.decode()))
    async with terminals.attach(BOX, opened.id) as slow:
        assert isinstance(await anext(slow), TerminalJoined)
        async with asyncio.timeout(120):
            while (await terminals.list(BOX))[0].ended is None:
                await asyncio.sleep(0.1)
        async with asyncio.timeout(60):
            rest = [event async for event in slow]
    lost = sum(event.lost_bytes for event in rest if isinstance(event, TerminalLost))
    shown = b"".join(event.data for event in rest if isinstance(event, ProcessOutput))
    assert lost > 0
    assert shown.endswith(b"%07d\r\n" % (1024 * 1024 - 1))
    assert isinstance(rest[-1], ProcessEnded)


async def test_what_is_not_there(ground: Ground) -> None:
    terminals = ground.driver.terminals
    with pytest.raises(NotFoundError, match="no terminal") as caught:
        await terminals.write(BOX, "0123", b"x")
    assert caught.value.code == "terminal_not_found"
    with pytest.raises(NotFoundError):
        async with terminals.attach(BOX, "0123") as events:
            await anext(events)


async def test_sixteen_may_look_and_who_leaves_makes_room(ground: Ground) -> None:
    terminals = ground.driver.terminals
    opened = await terminals.open(BOX, spec("cat"))
    async with AsyncExitStack() as looking:
        windows = [await looking.enter_async_context(terminals.attach(BOX, opened.id)) for _ in range(16)]
        for window in windows:
            assert isinstance(await anext(window), TerminalJoined)
        assert (await terminals.list(BOX))[0].viewers == 16
        with pytest.raises(GuestError, match="16") as caught:
            async with terminals.attach(BOX, opened.id) as events:
                await anext(events)
        assert caught.value.code == "guest_resource_exhausted"
    async with asyncio.timeout(30):
        while (await terminals.list(BOX))[0].viewers:
            await asyncio.sleep(0.05)
    await terminals.close(BOX, opened.id)


async def test_long_commands_leave_the_list_short(ground: Ground) -> None:
    terminals = ground.driver.terminals
    opened = [await terminals.open(BOX, spec("cat", "-", *["x" * 100_000] * 10)) for _ in range(3)]
    assert [each.arguments[:2] for each in await terminals.list(BOX)] == [("cat", "-")] * 3
    assert sum(map(len, opened[0].arguments)) == 4096
    for each in opened:
        await terminals.close(BOX, each.id)


async def test_no_more_than_32_and_an_ended_one_gives_way(ground: Ground) -> None:
    terminals = ground.driver.terminals
    opened = [await terminals.open(BOX, spec("cat")) for _ in range(32)]
    with pytest.raises(GuestError, match="32") as caught:
        await terminals.open(BOX, spec("cat"))
    assert caught.value.code == "guest_resource_exhausted"
    await terminals.write(BOX, opened[7].id, b"\x04")
    async with asyncio.timeout(30):
        while all(each.ended is None for each in await terminals.list(BOX)):
            await asyncio.sleep(0.05)
    if ground.endpoint.kind != "fake":  # there every program can be started
        with pytest.raises(NotFoundError):
            await terminals.open(BOX, spec("no-such-program"))
    assert len(await terminals.list(BOX)) == 32, "it gives way to one that begins, only"
    await terminals.open(BOX, spec("cat"))
    left = {each.id for each in await terminals.list(BOX)}
    assert opened[7].id not in left
    assert len(left) == 32
    for name in left:
        await terminals.close(BOX, name)
