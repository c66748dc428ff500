"""Guest root can impersonate the agent: whatever it sends, the gateway's memory stays bounded, the guest's channel ends
broken (or idle), and another sandbox's echo goes on."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest
from tests.contract.hostile_peer import ATTACKS
from tests.forked_programs import ForkedProgram, Program
from tests.real_machines import REPOSITORY

from atelier.guest_agent.channel import run_channel
from atelier.guest_protocol.stream import INITIAL_WINDOW_BYTES
from atelier.model.layout import RunLayout

HOSTILE = "hostilehosti"
HONEST = "honesthonest"
PATIENCE_SECONDS = 30.0
ATTACK_SECONDS = 0.6
MEMORY_MARGIN_BYTES = 24 * 1024 * 1024
"""Far above what the windows of the few streams here can hold, far below what an unbounded queue would take."""

# What a peer that only stalls or hangs up does is no violation.
NO_VIOLATION = {"silence", "silence_in_an_epoch", "hang_up_at_once", "tiny_frames"}


class Gateway:
    def __init__(self, root: Path, process: Program | asyncio.subprocess.Process) -> None:
        self.layout = RunLayout(root)
        self.process = process

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(status[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def ask(self, **request: object) -> dict:
        reader, writer = await asyncio.open_unix_connection(str(self.layout.gateway_socket))
        writer.write(json.dumps(request).encode() + b"\n")
        answer = json.loads(await asyncio.wait_for(reader.readline(), PATIENCE_SECONDS))
        writer.close()
        return answer

    async def attach(self, sandbox_id: str, path: Path) -> None:
        answer = await self.ask(operation="attach", sandbox_id=sandbox_id, socket_path=str(path), token="t")
        assert answer["ok"], answer

    async def channel(self, sandbox_id: str) -> dict:
        channels = (await self.ask(operation="list"))["channels"]
        return next(channel for channel in channels if channel["sandbox_id"] == sandbox_id)

    async def connect(self, sandbox_id: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # With this limit a client that does not read leaves all but a little in its socket.
        reader, writer = await asyncio.open_unix_connection(str(self.layout.channel_socket(sandbox_id)), limit=2048)
        writer.write(f"CONNECT {port}\n".encode())
        return reader, writer


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@contextlib.asynccontextmanager
async def started(*words: str) -> AsyncIterator[ForkedProgram]:
    with open(os.devnull, "wb") as nothing:
        process = ForkedProgram(words, environment=os.environ, folder=REPOSITORY, output=nothing, errors=nothing)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, PATIENCE_SECONDS)


async def until_there(path: Path) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not path.exists():
            await asyncio.sleep(0.01)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    """A gateway with an honest guest attached, in a folder of its own (socket paths are short)."""
    with tempfile.TemporaryDirectory(prefix="atelier-") as folder:
        root = Path(folder)
        async with started("atelier.gateway", "--run-dir", str(root), "--log-level", "ERROR") as process:
            gateway = Gateway(root, process)
            honest = asyncio.create_task(run_channel(f"unix:{root / 'honest'}", {1: echo}))
            await until_there(gateway.layout.gateway_socket)
            await gateway.attach(HONEST, root / "honest")
            yield gateway
            honest.cancel()


async def round_trips(gateway: Gateway, seconds: float) -> list[float]:
    """Echo through the honest channel for a while; the time each took."""
    reader, writer = await gateway.connect(HONEST, 1)
    assert (await asyncio.wait_for(reader.readuntil(b"\n"), PATIENCE_SECONDS)).startswith(b"OK ")
    taken: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        writer.write(b"!")
        assert await asyncio.wait_for(reader.readexactly(1), PATIENCE_SECONDS) == b"!"
        taken.append(time.monotonic() - began)
    writer.close()
    return taken


@pytest.mark.parametrize("attack", sorted(ATTACKS))
async def test_an_attack_costs_its_own_sandbox_only(gateway: Gateway, attack: str):
    quiet = await round_trips(gateway, 0.3)
    before_bytes, before_seconds = gateway.resident_bytes, gateway.cpu_seconds
    path = gateway.layout.root / "hostile"
    async with started("tests.contract.hostile_peer", str(path), attack):
        await until_there(path)
        await gateway.attach(HOSTILE, path)
        # Clients that do not read, one of which the guest may take stream 1 of.
        clients = [await gateway.connect(HOSTILE, 80) for _ in range(3)]
        under_attack = await round_trips(gateway, ATTACK_SECONDS)
        peak_bytes = gateway.resident_bytes
        if attack not in NO_VIOLATION:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not (await gateway.channel(HOSTILE))["violations"]:
                    await asyncio.sleep(0.05)
        channel = await gateway.channel(HOSTILE)
        spent_seconds = gateway.cpu_seconds - before_seconds
        for _, writer in clients:
            writer.transport.abort()
        answer = await gateway.ask(operation="detach", sandbox_id=HOSTILE)
    print(
        f"{attack}: echo {statistics.median(quiet) * 1000:.2f} -> {statistics.median(under_attack) * 1000:.2f} ms "
        f"(worst {max(under_attack) * 1000:.1f}), {len(under_attack)} round trips; memory "
        f"+{(peak_bytes - before_bytes) / 1e6:.1f} MB; cpu {spent_seconds:.2f} s; {channel['last_violation']}"
    )
    assert answer["ok"]
    assert peak_bytes - before_bytes < MEMORY_MARGIN_BYTES
    assert len(under_attack) > 20
    assert (await round_trips(gateway, 0.1))[0] < PATIENCE_SECONDS
    if attack in NO_VIOLATION:
        assert channel["violations"] == 0
    else:
        assert channel["last_violation"]


async def test_tiny_frames_for_a_client_that_does_not_read_are_kept_in_one_piece(gateway: Gateway):
    """A quarter of a million frames of one byte: a queue of them would be a hundred times their size."""
    path = gateway.layout.root / "hostile"
    async with started("tests.contract.hostile_peer", str(path), "tiny_frames"):
        await until_there(path)
        await gateway.attach(HOSTILE, path)
        before_bytes = gateway.resident_bytes
        _, writer = await gateway.connect(HOSTILE, 80)
        cast(asyncio.Transport, writer.transport).pause_reading()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await gateway.channel(HOSTILE))["frames_received"] < 250_000:
                await asyncio.sleep(0.05)
        assert gateway.resident_bytes - before_bytes < 16 * INITIAL_WINDOW_BYTES
        assert (await gateway.channel(HOSTILE))["violations"] == 0
        writer.transport.abort()


async def test_uploads_to_a_guest_that_never_reads_stay_with_their_clients(gateway: Gateway):
    path = gateway.layout.root / "hostile"
    async with started("tests.contract.hostile_peer", str(path), "silence_in_an_epoch"):
        await until_there(path)
        await gateway.attach(HOSTILE, path)
        before_bytes = gateway.resident_bytes
        clients = [await gateway.connect(HOSTILE, 80) for _ in range(50)]
        for _, writer in clients:
            writer.write(bytes(2_000_000))
        await round_trips(gateway, 0.5)
        assert gateway.resident_bytes - before_bytes < MEMORY_MARGIN_BYTES
        for _, writer in clients:
            writer.transport.abort()
        # The guest never says that it has closed them either; detaching frees them all the same.
        assert (await gateway.ask(operation="detach", sandbox_id=HOSTILE))["ok"]


async def test_more_clients_than_allowed_are_told(gateway: Gateway):
    path = gateway.layout.root / "hostile"
    async with started("tests.contract.hostile_peer", str(path), "silence_in_an_epoch"):
        await until_there(path)
        await gateway.attach(HOSTILE, path)
        refused = 0
        for _ in range(5):
            clients = [await gateway.connect(HOSTILE, 80) for _ in range(530)]
            answers = await asyncio.gather(
                *(asyncio.wait_for(reader.readuntil(b"\n"), PATIENCE_SECONDS) for reader, _ in clients),
                return_exceptions=True,
            )
            refused = answers.count(b"ERROR busy\n")
            await round_trips(gateway, 0.1)
            for _, writer in clients:
                writer.transport.abort()
            if refused >= 18:
                break
            # On a slow machine the first have waited in vain, and gone, before the last came.
        assert refused >= 18


async def test_the_log_of_a_hostile_channel_does_not_grow_without_bound():
    with tempfile.TemporaryDirectory(prefix="atelier-") as folder:
        root = Path(folder)
        path = root / "hostile"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "atelier.gateway", "--run-dir", folder, stderr=asyncio.subprocess.PIPE
        )
        gateway = Gateway(root, process)
        await until_there(gateway.layout.gateway_socket)
        async with started("tests.contract.hostile_peer", str(path), "opens_from_the_guest"):
            await gateway.attach(HOSTILE, path)
            await asyncio.sleep(2)
            assert (await gateway.channel(HOSTILE))["violations"] < 20
        process.terminate()
        _, log = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
        assert len(log) < 10_000
