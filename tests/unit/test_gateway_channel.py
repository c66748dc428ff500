"""The gateway process with guests' ends in this process, over unix sockets: no VM is needed for any of it."""

import asyncio
import contextlib
import hashlib
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from tests.gateway_program import PATIENCE_SECONDS, SANDBOX, Gateway, until

from atelier.guest_agent.channel import run_channel
from atelier.guest_protocol.stream import FULL_WINDOW_BYTES

OTHER = "bcdefghijk34"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def source(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    size = int(await reader.readline())
    block = bytes(range(256)) * 512
    while size > 0:
        writer.write(block[: min(size, len(block))])
        await writer.drain()
        size -= len(block)


async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    state = hashlib.sha256()
    while data := await reader.read(1 << 20):
        state.update(data)
    writer.write(state.hexdigest().encode())


async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def failing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    raise RuntimeError("on purpose")


SERVERS = {1: echo, 2: source, 3: digest, 4: deaf, 5: failing}


@pytest.fixture
def folder():
    # Not pytest's own folder: socket paths are short.
    with tempfile.TemporaryDirectory(prefix="atelier-") as path:
        yield Path(path)


@contextlib.asynccontextmanager
async def guest(path: Path, on_token: Callable[[str], None] | None = None) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(run_channel(f"unix:{path}", SERVERS, on_token))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def gateway(folder: Path):
    gateway = Gateway(folder / "run")
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0
    assert not gateway.layout.gateway_socket.exists()
    assert not list(gateway.layout.channels.glob("*.sock"))


async def test_echo_half_close_and_token(gateway: Gateway, folder: Path):
    tokens: list[str] = []
    async with guest(folder / "vmm", tokens.append):
        await gateway.attach(folder / "vmm", token="the token")
        reader, writer = await gateway.connect(1)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.write(b"x" * 3_000_000)
        writer.write_eof()
        assert await reader.read() == b"x" * 3_000_000
        writer.close()
        assert tokens == ["the token"]
        channel = await gateway.channel()
        assert (channel["state"], channel["epochs"], channel["violations"]) == ("open", 1, 0)
        await _no_streams(gateway)


async def _no_streams(gateway: Gateway) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            channel = await gateway.channel()
            if channel["streams"] == channel["clients"] == 0:
                return
            await asyncio.sleep(0.02)


async def test_bulk_both_ways_by_hash(gateway: Gateway, folder: Path):
    async with guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")
        content = os.urandom(1 << 20) * 32
        reader, writer = await gateway.connect(3)
        writer.write(content)
        writer.write_eof()
        assert (await reader.read()).decode() == hashlib.sha256(content).hexdigest()
        reader, writer = await gateway.connect(2)
        writer.write(b"33554432\n")
        received = await reader.read()
        assert received == bytes(range(256)) * (33554432 // 256)


async def test_bytes_sent_with_the_request_are_not_lost(gateway: Gateway, folder: Path):
    async with guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")
        reader, writer = await asyncio.open_unix_connection(str(gateway.layout.channel_socket(SANDBOX)))
        writer.write(b"CONNECT 1\nearly" + b"y" * 400_000)
        writer.write_eof()
        answer = await reader.read()
        assert answer.split(b"\n", 1)[0].startswith(b"OK ")
        assert answer.split(b"\n", 1)[1] == b"early" + b"y" * 400_000


async def test_many_streams_at_once(gateway: Gateway, folder: Path):
    async with guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")

        async def one(number: int) -> None:
            content = bytes([number]) * (1000 * number + 1)
            reader, writer = await gateway.connect(1)
            writer.write(content)
            writer.write_eof()
            assert await reader.read() == content
            writer.close()

        await asyncio.gather(*(one(number) for number in range(100)))
        await _no_streams(gateway)


async def test_other_ports_lead_to_the_loopback_of_the_guest(gateway: Gateway, folder: Path):
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")
        reader, writer = await gateway.connect(port)
        writer.write(b"z" * 2_000_000)
        writer.write_eof()
        assert await reader.read() == b"z" * 2_000_000
        writer.close()
        server.close()
        _, _, answer = await gateway.try_connect(port)
        assert answer == b"ERROR refused\n"
        await _no_streams(gateway)


async def test_a_server_on_ipv6_loopback_only_is_reached(gateway: Gateway, folder: Path):
    try:
        server = await asyncio.start_server(echo, "::1", 0)
    except OSError:
        pytest.skip("no IPv6 loopback here")
    async with server, guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")
        reader, writer = await gateway.connect(server.sockets[0].getsockname()[1])
        writer.write(b"six")
        writer.write_eof()
        assert await reader.read() == b"six"


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x", "", "1 2", "٣", "9" * 40])
async def test_a_bad_request_is_said(gateway: Gateway, folder: Path, port: str):
    async with guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")
        _, _, answer = await gateway.try_connect(port)
        assert answer == b"ERROR bad_request\n"


async def test_a_server_that_fails_resets_its_stream_only(
    gateway: Gateway, folder: Path, capsys: pytest.CaptureFixture[str]
):
    async with guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")
        reader, _ = await gateway.connect(5)
        assert await reader.read() == b""
        assert "on purpose" in capsys.readouterr().err
        reader, writer = await gateway.connect(1)
        writer.write(b"fine")
        assert await reader.readexactly(4) == b"fine"


async def test_a_client_that_does_not_read_stalls_itself_only(gateway: Gateway, folder: Path):
    async with guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")
        stalled = [await gateway.connect(2) for _ in range(4)]
        for _, writer in stalled:
            writer.write(b"1000000000\n")
        deafs = [await gateway.connect(4) for _ in range(4)]
        for _, writer in deafs:
            writer.write(bytes(4_000_000))
        reader, writer = await gateway.connect(1)
        for _ in range(50):
            writer.write(b"ping")
            assert await asyncio.wait_for(reader.readexactly(4), PATIENCE_SECONDS) == b"ping"
        received = (await gateway.channel())["received_bytes"]
        assert received < 4 * (FULL_WINDOW_BYTES + 1_000_000)
        for _, leaving in (*stalled, *deafs):
            leaving.transport.abort()
        writer.close()
        await _no_streams(gateway)


async def test_a_client_that_goes_away_closes_its_stream(gateway: Gateway, folder: Path):
    gone = asyncio.Event()

    async def waits_for_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"still there?")
                await writer.drain()
                await asyncio.sleep(0.02)
        gone.set()

    task = asyncio.create_task(run_channel(f"unix:{folder / 'vmm'}", {9: waits_for_the_end}))
    await gateway.attach(folder / "vmm")
    _, writer = await gateway.connect(9)
    writer.transport.abort()
    await asyncio.wait_for(gone.wait(), PATIENCE_SECONDS)
    await _no_streams(gateway)
    task.cancel()


async def test_nobody_there_is_unreachable_and_late_guests_are_waited_for(folder: Path):
    gateway = Gateway(folder / "run")
    await gateway.start("--epoch-wait-seconds", "0.3")
    await gateway.attach(folder / "vmm")
    assert (await gateway.try_connect(1))[2] == b"ERROR unreachable\n"
    assert (await gateway.channel())["state"] == "connecting"
    await gateway.stop()
    await gateway.start("--epoch-wait-seconds", str(PATIENCE_SECONDS))
    waiting = asyncio.create_task(gateway.try_connect(1))
    await asyncio.sleep(0.1)
    async with guest(folder / "vmm"):
        assert (await waiting)[2].startswith(b"OK ")
    await gateway.stop()


async def test_a_gateway_restart_needs_nobody(gateway: Gateway, folder: Path):
    async with guest(folder / "vmm"):
        await gateway.attach(folder / "vmm")
        reader, writer = await gateway.connect(2)
        writer.write(b"100000000\n")
        await reader.readexactly(1_000_000)
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            await gateway.stop(number)
            with contextlib.suppress(ConnectionError):
                while await reader.read(1 << 20):
                    pass
            gateway.layout.gateway_socket.unlink(missing_ok=True)
            await gateway.start()
            reader, writer = await gateway.connect(2)
            writer.write(b"100000000\n")
            await reader.readexactly(1_000_000)
        assert (await gateway.channel())["violations"] == 0


async def test_a_guest_agent_restart_needs_nobody(gateway: Gateway, folder: Path):
    """The port goes on where it was when the agent dies: a wire that outlives both ends is put between."""
    async with Wire(folder / "vmm", folder / "inner"):
        for attempt in range(1, 6):
            async with guest(folder / "inner"):
                if attempt == 1:
                    await gateway.attach(folder / "vmm")
                    reader, writer = await gateway.connect(2)
                else:
                    reader, writer = await connect_again(gateway, 2)
                writer.write(b"100000000\n")
                await reader.readexactly(400_000)
                upload = await gateway.connect(4)
                upload[1].write(bytes(3_000_000))
        async with guest(folder / "inner"):
            reader, writer = await connect_again(gateway, 1)
            writer.write(b"after")
            assert await reader.readexactly(5) == b"after"
        channel = await gateway.channel()
        assert channel["violations"] == 0
        assert channel["epochs"] >= 6


async def connect_again(gateway: Gateway, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As a client does that was cut: the old epoch may still look open for a moment."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            reader, writer, answer = await gateway.try_connect(port)
            if answer.startswith(b"OK "):
                return reader, writer
            await asyncio.sleep(0.02)


class Wire:
    """Stands between gateway and guest like QEMU's port: keeps the gateway's connection while guests come and go."""

    def __init__(self, outer: Path, inner: Path) -> None:
        self._outer = outer
        self._inner = inner

    async def __aenter__(self) -> "Wire":
        self._server = await asyncio.start_unix_server(self._serve, str(self._outer))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, host_reader: asyncio.StreamReader, host_writer: asyncio.StreamWriter) -> None:
        while not host_reader.at_eof():
            try:
                guest_reader, guest_writer = await asyncio.open_unix_connection(str(self._inner))
            except OSError:
                await asyncio.sleep(0.01)
                continue
            down = asyncio.create_task(_pump(host_reader, guest_writer))
            with contextlib.suppress(ConnectionError):
                await _pump(guest_reader, host_writer)
            down.cancel()
            guest_writer.close()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await down
        host_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(10_007):
        writer.write(data)
        await writer.drain()


async def test_control_answers(gateway: Gateway, folder: Path):
    assert (await gateway.ask(operation="ping"))["ok"] is True
    for request in (
        {},
        {"operation": "dance"},
        {"operation": ["attach"]},
        {"operation": "attach"},
        {"operation": "attach", "sandbox_id": "../../etc/pw", "socket_path": "/x", "token": "t"},
        {"operation": "attach", "sandbox_id": SANDBOX, "socket_path": "relative", "token": "t"},
        {"operation": "attach", "sandbox_id": SANDBOX, "socket_path": "/x", "token": "t" * 1025},
        {"operation": "attach", "sandbox_id": SANDBOX, "socket_path": "/x", "token": None},
        {"operation": "detach", "sandbox_id": 7},
    ):
        answer = await gateway.ask(**request)
        assert (answer["ok"], answer["code"]) == (False, "invalid_request"), request
        assert answer["message"]
    answers = await gateway.ask_raw(b'nonsense\n[1]\n{"operation": "ping"}\n' + b"[" * 50_000 + b"\n")
    assert [answer["ok"] for answer in answers] == [False, False, True, False]
    assert (await gateway.ask_raw(b"x" * 70_000 + b"\n"))[0]["code"] == "invalid_request"
    assert (await gateway.ask(operation="list"))["channels"] == []


async def test_attach_and_detach_leave_nothing(gateway: Gateway, folder: Path):
    channels = gateway.layout.channels
    async with guest(folder / "vmm"):
        await gateway.attach(folder / "vmm", token="secret")
        await gateway.attach(folder / "vmm", token="secret")
        reader, _ = await gateway.connect(1)
        assert stat.S_IMODE(channels.stat().st_mode) == 0o700
        for file in (*channels.iterdir(), gateway.layout.gateway_socket):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        await gateway.ask(operation="detach", sandbox_id=SANDBOX)
        assert await reader.read() == b""
        assert (await gateway.ask(operation="detach", sandbox_id=SANDBOX))["ok"]
        assert [file.name for file in channels.iterdir()] == ["gateway.lock"]
        assert (await gateway.ask(operation="list"))["channels"] == []


async def test_attach_with_another_token_begins_anew(gateway: Gateway, folder: Path):
    tokens: list[str] = []
    async with guest(folder / "vmm", tokens.append):
        await gateway.attach(folder / "vmm", token="one")
        await gateway.connect(1)
        await gateway.attach(folder / "vmm", token="two")
        await gateway.connect(1)
    assert tokens == ["one", "two"]


async def test_one_gateway_per_run_directory(gateway: Gateway):
    second = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "atelier.gateway",
        "--run-dir",
        str(gateway.layout.root),
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await asyncio.wait_for(second.communicate(), PATIENCE_SECONDS)
    assert second.returncode == 1
    assert b"another gateway" in stderr
    assert (await gateway.ask(operation="ping"))["ok"]


async def test_damaged_attachments_and_dead_sockets_do_not_stop_the_start(folder: Path):
    gateway = Gateway(folder / "run")
    channels = gateway.layout.channels
    channels.mkdir(parents=True)
    (channels / f"{SANDBOX}.json").write_text("{half")
    (channels / f"{OTHER}.json").write_text('{"sandbox_id": "../..", "socket_path": "/x", "token": ""}')
    (channels / f"{OTHER}.sock").write_text("")
    await gateway.start()
    assert (await gateway.ask(operation="list"))["channels"] == []
    assert not gateway.layout.channel_socket(OTHER).exists()
    assert await gateway.stop() == 0


async def test_a_link_in_the_place_of_the_vmm_socket_is_not_followed(gateway: Gateway, folder: Path):
    async with guest(folder / "vmm"):
        await until((folder / "vmm").exists)
        (folder / "link").symlink_to(folder / "vmm")
        (folder / "file").write_text("no socket")
        await gateway.attach(folder / "link")
        await gateway.attach(folder / "file", OTHER)
        for sandbox_id in (SANDBOX, OTHER):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not (channel := await gateway.channel(sandbox_id))["last_error"]:
                    await asyncio.sleep(0.02)
            assert (channel["state"], channel["sent_bytes"]) == ("connecting", 0)


async def test_the_gateway_starts_fast_enough_to_be_restarted(folder: Path):
    gateway = Gateway(folder / "run")
    began = time.monotonic()
    await gateway.start()
    print(f"gateway up after {time.monotonic() - began:.2f} s")
    assert await gateway.stop() == 0
    assert time.monotonic() - began < PATIENCE_SECONDS
