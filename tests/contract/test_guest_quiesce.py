"""A guest that stands still for a snapshot, asked of every guest driver; what a fake guest's memory carries along.

The agent on this host keeps off the system, so nothing is frozen here but its own services: the freezer is shown in
``test_agent_freezer``, all of it in ``tests/vm``.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from test_guest_contract import BOX, TOKEN, Ground, get, ground, next_of, put, run

from atelier.drivers.guest.fake import FakeGuests
from atelier.lifecycle.ssh_host_key import make_ssh_host_key
from atelier.model.errors import GuestUnreachableError
from atelier.model.guest import (
    GuestIdentity,
    ProcessEnded,
    ProcessOutput,
    ProcessSpec,
    ProcessStarted,
    TerminalSize,
)
from atelier.model.machine import GuestAddress, GuestEndpoint

__all__ = ["ground"]  # the fixture

FORK = "bcdefghijklm"
STILL_SECONDS = 0.5


def identity(**changes: object) -> GuestIdentity:
    fields: dict[str, object] = {
        "hostname": "box",
        "machine_id": "0" * 32,
        "token": TOKEN,
        "entropy": bytes(32),
        "host_time_ns": 1_700_000_000_000_000_000,
        "network": GuestAddress("10.9.0.7", 16, "10.9.0.1", "10.9.0.1"),
        "mac_address": "02:00:00:00:00:07",
        "host_key": make_ssh_host_key(),
        "generation": str(uuid.uuid4()),
        "restored": True,
    }
    return GuestIdentity(**{**fields, **changes})  # type: ignore[arg-type]


async def still_waits(task: asyncio.Task[object]) -> bool:
    done, _ = await asyncio.wait((task,), timeout=STILL_SECONDS)
    return not done


async def test_both_may_be_asked_twice_and_thaw_of_what_moves(ground: Ground) -> None:
    await ground.driver.thaw(BOX)
    for _ in range(2):
        await ground.driver.quiesce(BOX)
    for _ in range(2):
        await ground.driver.thaw(BOX)
    assert (await run(ground, "echo", "on"))[0] == b"on\n"


async def test_what_could_write_waits_and_the_rest_is_answered(ground: Ground) -> None:
    driver = ground.driver
    await put(ground, ground.folder + b"/before", b"old")
    await driver.quiesce(BOX)
    waiting: list[asyncio.Task[object]] = [
        asyncio.create_task(run(ground, "echo", "late")),
        asyncio.create_task(put(ground, ground.folder + b"/late", b"new")),
        asyncio.create_task(get(ground, ground.folder + b"/before")),
        asyncio.create_task(driver.list_processes(BOX)),
        asyncio.create_task(driver.make_directory(BOX, ground.folder + b"/folder")),
    ]
    for task in waiting:
        assert await still_waits(task)
    await driver.wait_ready(BOX, 10)
    assert (await driver.metrics(BOX)).cpu_count >= 1
    assert abs(await driver.synchronize_clock(BOX)) < 60
    await driver.initialize(BOX, identity())
    for task in waiting:
        assert not task.done(), "an identity does not let the guest go on"
    await driver.thaw(BOX)
    async with asyncio.timeout(30):
        results = await asyncio.gather(*waiting)
    assert results[0] == (b"late\n", b"", ProcessEnded(0, "exit status 0"))
    assert results[2] == (3, b"old")
    assert await get(ground, ground.folder + b"/late") == (3, b"new")


async def test_an_upload_that_is_under_way_waits_and_is_whole_afterwards(ground: Ground) -> None:
    go_on, sent = asyncio.Event(), asyncio.Event()
    piece = bytes(range(256)) * 256

    async def chunks() -> AsyncIterator[bytes]:
        yield piece
        sent.set()
        await go_on.wait()
        for _ in range(40):
            yield piece

    path = ground.folder + b"/long"
    upload = asyncio.create_task(ground.driver.write_file(BOX, path, chunks()))
    await sent.wait()
    await ground.driver.quiesce(BOX)
    go_on.set()
    assert await still_waits(upload)
    await ground.driver.wait_ready(BOX, 10)
    await ground.driver.thaw(BOX)
    async with asyncio.timeout(30):
        assert (await upload).size_bytes == 41 * len(piece)
    assert (await get(ground, path))[1] == piece * 41


async def test_who_went_away_meanwhile_is_served_no_more(ground: Ground) -> None:
    await ground.driver.quiesce(BOX)
    path = ground.folder + b"/abandoned"
    abandoned = asyncio.create_task(ground.driver.make_directory(BOX, path))
    assert await still_waits(abandoned)
    abandoned.cancel()
    await asyncio.gather(abandoned, return_exceptions=True)
    await asyncio.sleep(STILL_SECONDS)
    await ground.driver.thaw(BOX)
    assert path not in [entry.raw_path for entry in await ground.driver.list_directory(BOX, ground.folder)]


async def test_a_stream_of_output_outlives_it(ground: Ground) -> None:
    driver = ground.driver
    async with driver.start_process(BOX, ProcessSpec(("cat",), stdin=True)) as events:
        started = await next_of(events, ProcessStarted)
        assert isinstance(started, ProcessStarted)
        await driver.quiesce(BOX)
        await driver.thaw(BOX)
        await driver.send_input(BOX, started.pid, b"after")
        await driver.close_input(BOX, started.pid)
        rest = [event async for event in events]
    assert b"".join(event.data for event in rest if isinstance(event, ProcessOutput)) == b"after"


async def test_an_unknown_sandbox(ground: Ground) -> None:
    with pytest.raises(GuestUnreachableError):
        await ground.driver.quiesce("mmmmmmmmmmmm")
    with pytest.raises(GuestUnreachableError):
        await ground.driver.thaw("mmmmmmmmmmmm")


# The memory of a fake guest.


@pytest.fixture
async def fakes() -> AsyncIterator[FakeGuests]:
    guests = FakeGuests()
    await guests.ensure_channel(BOX, GuestEndpoint("fake", Path("/nonexistent")), TOKEN)
    yield guests
    await guests.close()


async def started(guests: FakeGuests, spec: ProcessSpec) -> int:
    async with guests.start_process(BOX, spec) as events:
        event = await next_of(events, ProcessStarted)
    assert isinstance(event, ProcessStarted)
    return event.pid


async def output_of(guests: FakeGuests, sandbox_id: str, pid: int) -> tuple[bytes, ProcessEnded]:
    async with asyncio.timeout(10), guests.connect_process(sandbox_id, pid) as events:
        got = [event async for event in events]
    assert isinstance(got[-1], ProcessEnded)
    return b"".join(event.data for event in got if isinstance(event, ProcessOutput)), got[-1]


async def chunks_of(content: bytes) -> AsyncIterator[bytes]:
    yield content


@pytest.mark.parametrize("offered_first", [True, False])
async def test_a_fork_has_files_and_processes_and_goes_its_own_way(fakes: FakeGuests, offered_first: bool) -> None:
    await fakes.initialize(BOX, identity(hostname="parent", environment={"A": "b"}, restored=False))
    await fakes.write_file(BOX, b"/tmp/both", chunks_of(b"before"))
    typed = await started(fakes, ProcessSpec(("cat",), terminal=TerminalSize(90, 20), tag="shell"))
    piped = await started(fakes, ProcessSpec(("cat",), stdin=True))
    slept = await started(fakes, ProcessSpec(("sleep", "600")))
    await fakes.send_input(BOX, typed, b"first\r", terminal=True)
    await asyncio.sleep(0.01)
    await fakes.send_input(BOX, typed, b"hal", terminal=True)
    await fakes.send_input(BOX, piped, b"one ")
    await asyncio.sleep(0.01)
    await fakes.quiesce(BOX)
    memory = fakes.dump(BOX)
    await fakes.thaw(BOX)
    await fakes.write_file(BOX, b"/tmp/parents", chunks_of(b"after"))
    endpoint = GuestEndpoint("fake", Path("/nonexistent"))
    if offered_first:
        await fakes.ensure_channel(FORK, endpoint, "fork's token")
        fakes.load(FORK, memory)
    else:
        fakes.load(FORK, memory)
        assert await fakes.list_channels() == [BOX], "it is not offered before it is asked for"
        await fakes.ensure_channel(FORK, endpoint, "fork's token")
    known = fakes.identity(FORK)
    assert known is not None
    assert (known.hostname, known.environment) == ("parent", {"A": "b"}), "nobody has told it anything yet"
    await fakes.initialize(FORK, identity(hostname="fork"))
    await fakes.thaw(FORK)
    assert sorted(summary.pid for summary in await fakes.list_processes(FORK)) == [typed, piped, slept]
    async with fakes.read_file(FORK, b"/tmp/both") as (_, chunks):
        assert b"".join([chunk async for chunk in chunks]) == b"before"
    assert b"/tmp/parents" not in [entry.raw_path for entry in await fakes.list_directory(FORK, b"/tmp")]
    await fakes.send_input(FORK, typed, b"f\r\x04", terminal=True)
    assert (await output_of(fakes, FORK, typed))[0] == b"first\r\nfirst\r\nhalf\r\nhalf\r\n"
    for sandbox_id, word in ((BOX, b"parent"), (FORK, b"fork")):
        await fakes.send_input(sandbox_id, piped, word)
        await fakes.close_input(sandbox_id, piped)
        assert await output_of(fakes, sandbox_id, piped) == (b"one " + word, ProcessEnded(0, "exit status 0"))


async def test_no_fake_program_takes_a_step_while_its_guest_stands_still(fakes: FakeGuests) -> None:
    piped = await started(fakes, ProcessSpec(("cat",), stdin=True))
    slept = await started(fakes, ProcessSpec(("sleep", "0.2")))
    await fakes.send_input(BOX, piped, b"before ")
    await asyncio.sleep(0.01)
    await fakes.quiesce(BOX)
    late = asyncio.create_task(fakes.send_signal(BOX, piped, 15))
    await asyncio.sleep(STILL_SECONDS)
    assert not late.done()
    await fakes.thaw(BOX)
    await late
    assert (await output_of(fakes, BOX, slept))[1] == ProcessEnded(0, "exit status 0")
    assert (await output_of(fakes, BOX, piped))[1].exit_code == 128 + 15


async def test_a_restored_fake_guest_replaces_the_one_before(fakes: FakeGuests) -> None:
    await fakes.write_file(BOX, b"/tmp/kept", chunks_of(b"x"))
    pid = await started(fakes, ProcessSpec(("cat",), stdin=True))
    await fakes.quiesce(BOX)
    memory = fakes.dump(BOX)
    await fakes.thaw(BOX)
    await fakes.close_input(BOX, pid)
    await output_of(fakes, BOX, pid)
    fakes.load(BOX, memory)
    await fakes.thaw(BOX)
    assert [summary.pid for summary in await fakes.list_processes(BOX)] == [pid]
    with pytest.raises(GuestUnreachableError):
        fakes.dump("mmmmmmmmmmmm")
