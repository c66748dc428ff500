"""One suite for every guest driver: the fake one, and the real one with a guest agent on this host behind a bridge."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import socket
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from guest_bridge import bridged_agent

from atelier.drivers.guest.agent import AgentGuests
from atelier.drivers.guest.fake import FakeGuests
from atelier.drivers.guest.interface import GuestDriver
from atelier.model.errors import (
    AtelierError,
    ConflictError,
    GuestUnreachableError,
    InvalidRequestError,
    NotFoundError,
    TimeoutExceededError,
)
from atelier.model.guest import (
    EntryType,
    GuestIdentity,
    ProcessEnded,
    ProcessEvent,
    ProcessOutput,
    ProcessSpec,
    ProcessStarted,
    TerminalSize,
)
from atelier.model.machine import GuestEndpoint

BOX = "abcdefghijkl"
TOKEN = "first-token"


@dataclass
class Ground:
    """A driver with one ready sandbox. ``folder`` is an empty folder in the guest."""

    driver: GuestDriver
    endpoint: GuestEndpoint
    folder: bytes


@pytest.fixture(params=["fake", "agent"])
async def ground(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ground]:
    if request.param == "fake":
        fake = FakeGuests()
        endpoint = GuestEndpoint("fake", tmp_path)
        await fake.ensure_channel(BOX, endpoint, TOKEN)
        await fake.wait_ready(BOX, 10)
        await fake.make_directory(BOX, b"/tmp/ground")
        yield Ground(fake, endpoint, b"/tmp/ground")
        await fake.close()
        return
    if os.getuid() != 0:
        pytest.skip("the guest agent on this host acts for root by default")
    run = tmp_path / "r"
    run.mkdir()
    (tmp_path / "ground").mkdir()
    async with bridged_agent(run) as (bridge, agent):
        driver = AgentGuests(bridge.channel_socket, bridge.gateway_socket)
        endpoint = GuestEndpoint("virtio_serial", agent.socket_path)
        await driver.ensure_channel(BOX, endpoint, TOKEN)
        await driver.wait_ready(BOX, 30)
        yield Ground(driver, endpoint, bytes(tmp_path / "ground"))
        await driver.close()


async def run(ground: Ground, *arguments: str, **options: object) -> tuple[bytes, bytes, ProcessEnded]:
    spec = ProcessSpec(arguments, **options)  # type: ignore[arg-type]
    outputs: dict[str, bytes] = {}
    async with asyncio.timeout(60), ground.driver.start_process(BOX, spec) as events:
        got = [event async for event in events]
    assert isinstance(got[0], ProcessStarted)
    assert isinstance(got[-1], ProcessEnded)
    for event in got[1:-1]:
        assert isinstance(event, ProcessOutput)
        outputs[event.stream] = outputs.get(event.stream, b"") + event.data
    assert outputs.keys() <= {"stdout", "stderr", "pty"}
    return outputs.get("stdout", outputs.get("pty", b"")), outputs.get("stderr", b""), got[-1]


async def put(ground: Ground, path: bytes, content: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 50_000):
            yield content[start : start + 50_000]

    await ground.driver.write_file(BOX, path, chunks())


async def get(ground: Ground, path: bytes, **options: int | None) -> tuple[int, bytes]:
    async with ground.driver.read_file(BOX, path, **options) as (total, chunks):  # type: ignore[arg-type]
        return total, b"".join([chunk async for chunk in chunks])


# The channel.


async def test_offering_twice_and_taking_away_twice(ground: Ground) -> None:
    await ground.driver.ensure_channel(BOX, ground.endpoint, TOKEN)
    await ground.driver.wait_ready(BOX, 10)
    assert await ground.driver.list_processes(BOX) == []
    await ground.driver.ensure_channel_absent(BOX)
    await ground.driver.ensure_channel_absent(BOX)
    with pytest.raises(GuestUnreachableError):
        await ground.driver.stat(BOX, b"/")
    with pytest.raises(TimeoutExceededError):
        await ground.driver.wait_ready(BOX, 0.2)


async def test_offered_channels_are_listed(ground: Ground) -> None:
    assert await ground.driver.list_channels() == [BOX]
    await ground.driver.ensure_channel_absent(BOX)
    assert await ground.driver.list_channels() == []


async def test_an_unknown_sandbox_is_unreachable(ground: Ground) -> None:
    with pytest.raises(GuestUnreachableError):
        await ground.driver.metrics("mmmmmmmmmmmm")
    with pytest.raises(GuestUnreachableError):
        async with ground.driver.start_process("mmmmmmmmmmmm", ProcessSpec(("true",))) as events:
            async for _ in events:
                pass


async def test_initialize_and_metrics(ground: Ground) -> None:
    identity = GuestIdentity("box", "0" * 32, "second-token", bytes(32), 1_700_000_000_000_000_000, {"NAME": "value"})
    await ground.driver.initialize(BOX, identity)
    await ground.driver.initialize(BOX, identity)
    metrics = await ground.driver.metrics(BOX)
    assert metrics.cpu_count >= 1
    assert 0 <= metrics.cpu_used_percent <= 100
    assert 0 < metrics.memory_used_bytes < metrics.memory_total_bytes
    assert 0 <= metrics.disk_used_bytes < metrics.disk_total_bytes
    assert metrics.uptime_seconds >= 0


async def test_ports_on_which_programs_listen(ground: Ground) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    spec = ProcessSpec(("python3", "-m", "http.server", str(port), "--bind", "127.0.0.1"))
    assert port not in await ground.driver.list_ports(BOX)
    async with asyncio.timeout(60), ground.driver.start_process(BOX, spec) as events:
        started = await anext(events)
        assert isinstance(started, ProcessStarted)
        while port not in (ports := await ground.driver.list_ports(BOX)):
            await asyncio.sleep(0.05)
        assert ports == sorted(set(ports))
        await ground.driver.send_signal(BOX, started.pid, signal.SIGKILL)
        async for _ in events:
            pass
    assert port not in await ground.driver.list_ports(BOX)
    with pytest.raises(GuestUnreachableError):
        await ground.driver.list_ports("mmmmmmmmmmmm")


async def test_a_new_name_leaves_the_token(ground: Ground) -> None:
    await ground.driver.initialize(BOX, GuestIdentity("box", "0" * 32, TOKEN, bytes(32), 1, {"OLD": "value"}))
    await ground.driver.rename(BOX, "renamed", {"NEW": "value"})
    await ground.driver.rename(BOX, "renamed", {"NEW": "value"})
    assert (await ground.driver.metrics(BOX)).cpu_count >= 1
    with pytest.raises(GuestUnreachableError):
        await ground.driver.rename("mmmmmmmmmmmm", "renamed", {})


async def test_a_clock_that_is_right(ground: Ground) -> None:
    assert abs(await ground.driver.synchronize_clock(BOX)) < 5
    with pytest.raises(GuestUnreachableError):
        await ground.driver.synchronize_clock("mmmmmmmmmmmm")


async def test_shutting_down_an_unknown_sandbox(ground: Ground) -> None:
    with pytest.raises(GuestUnreachableError):
        await ground.driver.shut_down("mmmmmmmmmmmm")


async def test_the_fake_guest_shuts_down_as_told() -> None:
    guests = FakeGuests()
    await guests.ensure_channel(BOX, GuestEndpoint("fake", Path("/nonexistent")), TOKEN)
    stopped: list[str] = []
    guests.on_shut_down = stopped.append
    async with guests.start_process(BOX, ProcessSpec(("sleep", "1000"))):
        guests.ignores_shut_down = True
        await guests.shut_down(BOX)
        assert len(await guests.list_processes(BOX)) == 1
        guests.ignores_shut_down = False
        await guests.shut_down(BOX)
        assert stopped == [], "the guest agrees first"
        await asyncio.sleep(0)
        assert stopped == [BOX]
        assert await guests.list_processes(BOX) == []
    await guests.close()


async def test_the_fake_guests_clock_is_off_as_told() -> None:
    guests = FakeGuests()
    await guests.ensure_channel(BOX, GuestEndpoint("fake", Path("/nonexistent")), TOKEN)
    guests.set_clock_offset(BOX, -5.0)
    assert await guests.synchronize_clock(BOX) == -5.0
    assert await guests.synchronize_clock(BOX) == 0.0


# Processes.


async def test_exit_codes(ground: Ground) -> None:
    assert await run(ground, "true") == (b"", b"", ProcessEnded(0, "exit status 0"))
    assert await run(ground, "false") == (b"", b"", ProcessEnded(1, "exit status 1"))
    assert (await run(ground, "/bin/true"))[2].exit_code == 0


async def test_no_program_is_a_bad_request(ground: Ground) -> None:
    with pytest.raises(InvalidRequestError):
        async with ground.driver.start_process(BOX, ProcessSpec(())):
            pass


async def test_output_is_whole(ground: Ground) -> None:
    assert (await run(ground, "echo", "two", "words ü"))[0] == "two words ü\n".encode()
    content = os.urandom(3_000_000)
    await put(ground, ground.folder + b"/f", content)
    out, err, end = await run(ground, "cat", os.fsdecode(ground.folder + b"/f"))
    assert (hashlib.sha256(out).digest(), err, end.exit_code) == (hashlib.sha256(content).digest(), b"", 0)


async def test_stderr_is_apart(ground: Ground) -> None:
    out, err, end = await run(ground, "cat", os.fsdecode(ground.folder + b"/absent"))
    assert (out, end.exit_code) == (b"", 1)
    assert b"absent" in err


async def test_without_stdin_the_input_is_at_its_end(ground: Ground) -> None:
    assert (await run(ground, "cat"))[2].exit_code == 0


async def next_of(events: AsyncIterator[ProcessEvent], kind: type[ProcessEvent]) -> ProcessEvent:
    async with asyncio.timeout(30):
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError(f"the stream ended without {kind.__name__}")


async def test_stdin_there_and_closed(ground: Ground) -> None:
    content = bytes(range(256)) * 1000
    async with ground.driver.start_process(BOX, ProcessSpec(("cat",), stdin=True)) as events:
        started = await next_of(events, ProcessStarted)
        assert isinstance(started, ProcessStarted)
        await ground.driver.send_input(BOX, started.pid, content)
        await ground.driver.close_input(BOX, started.pid)
        rest = [event async for event in events]
    assert b"".join(event.data for event in rest if isinstance(event, ProcessOutput)) == content
    assert rest[-1] == ProcessEnded(0, "exit status 0")
    with pytest.raises(NotFoundError) as caught:
        await ground.driver.send_input(BOX, started.pid, b"x")
    assert caught.value.code == "process_not_found"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
async def test_signals(ground: Ground, number: signal.Signals) -> None:
    async with ground.driver.start_process(BOX, ProcessSpec(("sleep", "600"))) as events:
        started = await next_of(events, ProcessStarted)
        assert isinstance(started, ProcessStarted)
        await ground.driver.send_signal(BOX, started.pid, number)
        ended = await next_of(events, ProcessEnded)
    assert isinstance(ended, ProcessEnded)
    assert (ended.exit_code, ended.error) == (128 + number, "")
    assert ended.status == f"signal: {(signal.strsignal(number) or '').lower()}"


async def test_a_time_limit(ground: Ground) -> None:
    _, _, ended = await run(ground, "sleep", "600", timeout_seconds=0.3)
    assert (ended.exit_code, ended.error) == (137, "timeout")
    assert await ground.driver.list_processes(BOX) == []


async def test_detach_list_connect(ground: Ground) -> None:
    spec = ProcessSpec(("cat",), stdin=True, tag="mine")
    async with ground.driver.start_process(BOX, spec) as events:
        started = await next_of(events, ProcessStarted)
        assert isinstance(started, ProcessStarted)
        await ground.driver.send_input(BOX, started.pid, b"before ")
        await next_of(events, ProcessOutput)
    [summary] = await ground.driver.list_processes(BOX)
    assert (summary.pid, summary.tag, summary.arguments, summary.terminal) == (started.pid, "mine", ("cat",), False)
    async with ground.driver.connect_process(BOX, started.pid) as events:
        await ground.driver.send_input(BOX, started.pid, b"after")
        await ground.driver.close_input(BOX, started.pid)
        got = [event async for event in events]
    assert got[0] == started
    assert b"".join(event.data for event in got if isinstance(event, ProcessOutput)).endswith(b"after")
    assert got[-1] == ProcessEnded(0, "exit status 0")
    with pytest.raises(NotFoundError) as caught:
        async with ground.driver.connect_process(BOX, 4_000_000) as events:
            await anext(events)
    assert caught.value.code == "process_not_found"


async def test_an_end_that_nobody_saw_is_told_later(ground: Ground) -> None:
    # A guest needs a moment to see that its reader has gone, a busy machine's a longer one: what it says until then is
    # said to that reader.
    for moment_seconds in (0.5, 3, 15):
        said, end = await end_unseen(ground, moment_seconds)
        assert end == ProcessEnded(0, "exit status 0")
        if said == b"unseen":
            return
    raise AssertionError("what was said without a reader is lost")


async def end_unseen(ground: Ground, moment_seconds: float) -> tuple[bytes, ProcessEvent]:
    """What is told afterwards of a program that goes on by itself, ``moment_seconds`` after its reader has left it."""
    async with ground.driver.start_process(BOX, ProcessSpec(("cat",), stdin=True)) as events:
        started = await next_of(events, ProcessStarted)
        assert isinstance(started, ProcessStarted)
    await asyncio.sleep(moment_seconds)
    await ground.driver.send_input(BOX, started.pid, b"unseen")
    await ground.driver.close_input(BOX, started.pid)
    async with asyncio.timeout(30):
        while await ground.driver.list_processes(BOX):
            await asyncio.sleep(0.02)
    async with ground.driver.connect_process(BOX, started.pid) as events:
        got = [event async for event in events]
    return b"".join(event.data for event in got if isinstance(event, ProcessOutput)), got[-1]


async def test_a_terminal_echoes_resizes_and_interrupts(ground: Ground) -> None:
    driver = ground.driver
    spec = ProcessSpec(("cat",), terminal=TerminalSize(80, 24))
    async with driver.start_process(BOX, spec) as events:
        started = await next_of(events, ProcessStarted)
        assert isinstance(started, ProcessStarted)
        await driver.resize_terminal(BOX, started.pid, TerminalSize(100, 30))
        await driver.send_input(BOX, started.pid, b"keys\r", terminal=True)
        seen = b""
        while seen.count(b"keys\r\n") < 2:
            output = await next_of(events, ProcessOutput)
            assert isinstance(output, ProcessOutput)
            assert output.stream == "pty"
            seen += output.data
        assert seen == b"keys\r\nkeys\r\n"
        [summary] = await driver.list_processes(BOX)
        assert summary.terminal
        await driver.send_input(BOX, started.pid, b"\x03", terminal=True)
        ended = await next_of(events, ProcessEnded)
    assert isinstance(ended, ProcessEnded)
    assert ended.exit_code == 128 + signal.SIGINT
    out, _, end = await run(ground, "echo", "line", terminal=TerminalSize(80, 24))
    assert (out, end.exit_code) == (b"line\r\n", 0)


async def test_many_processes_at_once(ground: Ground) -> None:
    async def one(number: int) -> bytes:
        return (await run(ground, "echo", str(number)))[0]

    assert await asyncio.gather(*(one(number) for number in range(25))) == [b"%d\n" % n for n in range(25)]


@pytest.mark.parametrize(
    "call",
    [
        lambda driver: driver.send_input(BOX, 4_000_000, b"x"),
        lambda driver: driver.close_input(BOX, 4_000_000),
        lambda driver: driver.send_signal(BOX, 4_000_000, 15),
        lambda driver: driver.resize_terminal(BOX, 4_000_000, TerminalSize(1, 1)),
    ],
)
async def test_a_process_that_is_not_there(ground: Ground, call: object) -> None:
    with pytest.raises(NotFoundError) as caught:
        await call(ground.driver)  # type: ignore[operator]
    assert caught.value.code == "process_not_found"


# Files.


async def test_files_there_and_back(ground: Ground) -> None:
    path = ground.folder + b"/new/folder/f"
    content = os.urandom(1_234_567)
    await put(ground, path, content)
    assert await get(ground, path) == (len(content), content)
    entry = await ground.driver.stat(BOX, path)
    assert (entry.name, entry.raw_path, entry.type, entry.size_bytes) == ("f", path, EntryType.FILE, len(content))
    assert entry.mode == 0o644
    await put(ground, path, b"")
    assert await get(ground, path) == (0, b"")


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (8, 100, b"89"),
        (0, 10, b"0123456789"),
        (10, None, b""),
        (50, 5, b""),
        (4, 0, b""),
    ],
)
async def test_parts_of_files(ground: Ground, offset: int, length: int | None, expected: bytes) -> None:
    await put(ground, ground.folder + b"/f", b"0123456789")
    assert await get(ground, ground.folder + b"/f", offset=offset, length=length) == (10, expected)


async def test_reading_only_the_beginning(ground: Ground) -> None:
    await put(ground, ground.folder + b"/f", os.urandom(2_000_000))
    async with ground.driver.read_file(BOX, ground.folder + b"/f") as (total, chunks):
        assert total == 2_000_000
        assert await anext(chunks)
    assert (await ground.driver.stat(BOX, ground.folder + b"/f")).size_bytes == 2_000_000


async def test_an_upload_that_breaks_leaves_the_old_file(ground: Ground) -> None:
    path = ground.folder + b"/f"
    await put(ground, path, b"old")

    async def breaking() -> AsyncIterator[bytes]:
        yield bytes(600_000)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        await ground.driver.write_file(BOX, path, breaking())
    assert await get(ground, path) == (3, b"old")
    assert [entry.name for entry in await ground.driver.list_directory(BOX, ground.folder)] == ["f"]


async def test_folders(ground: Ground) -> None:
    driver, folder = ground.driver, ground.folder
    made = await driver.make_directory(BOX, folder + b"/a/b")
    assert (made.raw_path, made.type) == (folder + b"/a/b", EntryType.DIRECTORY)
    with pytest.raises(ConflictError):
        await driver.make_directory(BOX, folder + b"/a/b")
    await put(ground, folder + b"/a/f", b"x")
    with pytest.raises(InvalidRequestError):
        await driver.make_directory(BOX, folder + b"/a/f")

    async def names(depth: int) -> list[bytes]:
        entries = await driver.list_directory(BOX, folder, depth=depth)
        return [entry.raw_path.removeprefix(folder + b"/") for entry in entries]

    assert await names(1) == [b"a"]
    assert await names(2) == [b"a", b"a/b", b"a/f"]
    moved = await driver.move(BOX, folder + b"/a", folder + b"/c/d")
    assert moved.raw_path == folder + b"/c/d"
    assert await names(3) == [b"c", b"c/d", b"c/d/b", b"c/d/f"]
    await driver.remove(BOX, folder + b"/c/d/f")
    await driver.remove(BOX, folder + b"/c")
    await driver.remove(BOX, folder + b"/c")
    assert await names(3) == []


async def test_many_entries(ground: Ground) -> None:
    for number in range(40):
        await ground.driver.make_directory(BOX, ground.folder + b"/%03d" % number)
    entries = await ground.driver.list_directory(BOX, ground.folder)
    assert [entry.name for entry in entries] == [f"{number:03}" for number in range(40)]


async def test_names_that_are_no_text(ground: Ground) -> None:
    path = ground.folder + b"/\xff\n\xc3"
    await put(ground, path, b"x")
    [entry] = await ground.driver.list_directory(BOX, ground.folder)
    assert (entry.raw_path, entry.name) == (path, "\ufffd\n\ufffd")
    assert (await ground.driver.stat(BOX, path)).raw_path == path
    assert await get(ground, path) == (1, b"x")
    moved = await ground.driver.move(BOX, path, ground.folder + b"/\xfe")
    assert moved.raw_path == ground.folder + b"/\xfe"
    await ground.driver.remove(BOX, ground.folder + b"/\xfe")
    assert await ground.driver.list_directory(BOX, ground.folder) == []


async def test_names_with_a_meaning_elsewhere(ground: Ground) -> None:
    for name in (b"a b", b"a&b=c", b"100%", b"?#", b"+", "ü".encode(), b"-rf"):
        await put(ground, ground.folder + b"/" + name, name)
        assert await get(ground, ground.folder + b"/" + name) == (len(name), name)


@pytest.mark.parametrize("missing", [b"/absent", b"/absent/below", b"/f/below"])
async def test_what_is_not_there(ground: Ground, missing: bytes) -> None:
    await put(ground, ground.folder + b"/f", b"x")
    path, driver = ground.folder + missing, ground.driver
    errors: list[AtelierError] = []
    for call in (
        driver.stat(BOX, path),
        driver.list_directory(BOX, path),
        driver.move(BOX, path, ground.folder + b"/g"),
        get(ground, path),
    ):
        with pytest.raises(NotFoundError) as caught:
            await call
        errors.append(caught.value)
    with pytest.raises(NotFoundError) as caught:
        async with driver.read_archive(BOX, path):
            pass
    assert {error.code for error in [*errors, caught.value]} == {"path_not_found"}


async def test_what_a_folder_is_not(ground: Ground) -> None:
    with pytest.raises(InvalidRequestError):
        await get(ground, ground.folder)
    with pytest.raises(InvalidRequestError):
        await put(ground, ground.folder, b"x")
    await put(ground, ground.folder + b"/f", b"x")
    with pytest.raises(InvalidRequestError):
        await ground.driver.list_directory(BOX, ground.folder + b"/f")
    with pytest.raises(InvalidRequestError):
        await ground.driver.remove(BOX, b"/")
    with pytest.raises(InvalidRequestError):
        await ground.driver.stat(BOX, b"a\0b")


async def test_archives(ground: Ground) -> None:
    driver, folder = ground.driver, ground.folder
    await put(ground, folder + b"/from/sub/f", os.urandom(900_000))
    await driver.make_directory(BOX, folder + b"/from/empty")
    async with driver.read_archive(BOX, folder + b"/from") as chunks:
        archive = b"".join([chunk async for chunk in chunks])
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as opened:
        names = {name.removeprefix("./").removeprefix(".") for name in opened.getnames()}
    assert names - {""} == {"sub", "sub/f", "empty"}

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(archive), 10_000):
            yield archive[start : start + 10_000]

    await driver.write_archive(BOX, folder + b"/to/here", pieces())
    assert await get(ground, folder + b"/to/here/sub/f") == await get(ground, folder + b"/from/sub/f")

    async def nonsense() -> AsyncIterator[bytes]:
        yield b"no tar at all" * 1000

    with pytest.raises(InvalidRequestError):
        await driver.write_archive(BOX, folder + b"/bad", nonsense())


async def test_relative_paths_begin_at_home(ground: Ground) -> None:
    assert (await ground.driver.stat(BOX, b"", "root")).raw_path == b"/root"
    assert (await ground.driver.stat(BOX, b"~", "root")).raw_path == b"/root"
    assert (await ground.driver.stat(BOX, b"../tmp/.", "root")).raw_path == b"/tmp"
