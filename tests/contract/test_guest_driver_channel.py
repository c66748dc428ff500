"""The real guest driver against a channel that breaks, hangs and starts anew, with a guest agent of this host."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from guest_bridge import AgentProcess, GuestBridge, bridged_agent

from atelier.drivers.guest.agent import AgentGuests
from atelier.model.errors import (
    AccessDeniedError,
    GuestError,
    GuestUnreachableError,
    HostError,
    TimeoutExceededError,
)
from atelier.model.guest import GuestIdentity, ProcessEnded, ProcessSpec, ProcessStarted
from atelier.model.machine import GuestEndpoint

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="the guest agent on this host acts for root by default")
BOX = "abcdefghijkl"


@pytest.fixture
async def bridged(tmp_path: Path) -> AsyncIterator[tuple[AgentGuests, GuestBridge, AgentProcess]]:
    async with bridged_agent(tmp_path) as (bridge, agent):
        driver = AgentGuests(bridge.channel_socket, bridge.gateway_socket)
        await driver.ensure_channel(BOX, GuestEndpoint("virtio_serial", agent.socket_path), "token")
        await driver.wait_ready(BOX, 30)
        yield driver, bridge, agent
        await driver.close()


async def ended(driver: AgentGuests, *arguments: str) -> ProcessEnded:
    async with driver.start_process(BOX, ProcessSpec(arguments)) as events:
        async for event in events:
            if isinstance(event, ProcessEnded):
                return event
    raise AssertionError("no end")


async def test_one_connection_serves_many_requests(bridged: tuple[AgentGuests, GuestBridge, AgentProcess]) -> None:
    driver, bridge, _ = bridged
    before = bridge.connections
    for _ in range(10):
        await driver.stat(BOX, b"/")
        assert (await ended(driver, "true")).exit_code == 0
    assert bridge.connections - before <= 1


async def test_broken_connections_are_replaced(bridged: tuple[AgentGuests, GuestBridge, AgentProcess]) -> None:
    driver, bridge, agent = bridged
    await driver.stat(BOX, b"/")
    bridge.cut()
    assert (await driver.stat(BOX, b"/")).raw_path == b"/"
    await agent.kill()
    with pytest.raises(GuestUnreachableError):
        await driver.stat(BOX, b"/")
    await agent.start()
    await driver.wait_ready(BOX, 30)
    assert (await ended(driver, "true")).exit_code == 0


async def test_a_stream_that_breaks_is_told(bridged: tuple[AgentGuests, GuestBridge, AgentProcess]) -> None:
    driver, bridge, _ = bridged
    with pytest.raises(GuestUnreachableError):
        async with driver.start_process(BOX, ProcessSpec(("sleep", "60"))) as events:
            async for event in events:
                assert isinstance(event, ProcessStarted)
                bridge.cut()
    for process in await driver.list_processes(BOX):
        await driver.send_signal(BOX, process.pid, 9)


async def test_the_token_is_given_and_asked_for(bridged: tuple[AgentGuests, GuestBridge, AgentProcess]) -> None:
    driver, bridge, agent = bridged
    await driver.initialize(BOX, GuestIdentity("box", "0" * 32, "the-token", bytes(32), 1))
    assert (await driver.stat(BOX, b"/")).raw_path == b"/"
    other = AgentGuests(bridge.channel_socket, bridge.gateway_socket)
    with pytest.raises(GuestError) as caught:
        await other.stat(BOX, b"/")
    assert caught.value.code == "guest_refused_token"
    await other.ensure_channel(BOX, GuestEndpoint("virtio_serial", agent.socket_path), "the-token")
    assert (await other.stat(BOX, b"/")).raw_path == b"/"
    await other.close()
    assert bridge.requests[0] == {
        "operation": "attach", "sandbox_id": BOX, "socket_path": str(agent.socket_path), "kind": "virtio_serial",
        "token": "token",
    }  # fmt: skip


async def test_what_the_gateway_refuses(tmp_path: Path) -> None:
    async with bridged_agent(tmp_path) as (bridge, _):
        driver = AgentGuests(bridge.channel_socket, bridge.gateway_socket)
        with pytest.raises(HostError) as caught:
            await driver.ensure_channel(BOX, GuestEndpoint("virtio_serial", tmp_path / "absent"), "t")
        assert caught.value.code == "no_such_socket"
        with pytest.raises(HostError):
            await driver.ensure_channel(BOX, GuestEndpoint("fake", tmp_path), "t")
    alone = AgentGuests(bridge.channel_socket, tmp_path / "nowhere")
    for call in (
        alone.ensure_channel_absent(BOX),
        alone.ensure_channel(BOX, GuestEndpoint("virtio_serial", tmp_path), "t"),
    ):
        with pytest.raises(GuestUnreachableError) as unreachable:
            await call
        assert unreachable.value.code == "gateway_unreachable"
        assert str(tmp_path / "nowhere") in unreachable.value.hint


async def test_being_ready_does_not_wait_for_what_hangs(tmp_path: Path) -> None:
    """The first attempts are taken and never answered, as in a guest whose agent starts anew."""
    taken = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        taken += 1
        if taken <= 2:
            await reader.read()
        else:
            await reader.readline()
            writer.write(b"OK 1\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, str(tmp_path / "c.sock"))
    driver = AgentGuests(lambda _: tmp_path / "c.sock", tmp_path / "g.sock")
    await driver.wait_ready(BOX, 20)
    assert taken == 3
    await driver.close()
    server.close()


async def test_never_ready_says_why(tmp_path: Path) -> None:
    driver = AgentGuests(lambda _: tmp_path / "c.sock", tmp_path / "g.sock")
    with pytest.raises(TimeoutExceededError) as caught:
        await driver.wait_ready(BOX, 0.2)
    assert caught.value.code == "guest_not_ready"
    assert BOX in caught.value.message


async def test_rights_are_told(bridged: tuple[AgentGuests, GuestBridge, AgentProcess]) -> None:
    driver, _, _ = bridged

    async def chunks() -> AsyncIterator[bytes]:
        yield b"x"

    with pytest.raises(AccessDeniedError):
        await driver.write_file(BOX, b"/root/x", chunks(), "nobody")
    with pytest.raises(AccessDeniedError):
        async with driver.read_file(BOX, b"/etc/shadow", "nobody"):
            pass
    with pytest.raises(GuestError):
        await driver.stat(BOX, b"/", "no-such-user")


async def test_an_agent_that_keeps_off_its_system_does_not_shut_it_down(
    bridged: tuple[AgentGuests, GuestBridge, AgentProcess],
) -> None:
    driver, _, agent = bridged
    with pytest.raises(GuestError, match="keep off the system"):
        await driver.shut_down(BOX)
    assert (await driver.stat(BOX, b"/")).raw_path == b"/"
    await agent.kill()
    with pytest.raises(GuestUnreachableError):
        await driver.shut_down(BOX)


async def test_channels_are_listed_by_the_gateway_only(
    bridged: tuple[AgentGuests, GuestBridge, AgentProcess],
) -> None:
    driver, bridge, agent = bridged
    await driver.ensure_channel("mmmmmmmmmmmm", GuestEndpoint("virtio_serial", agent.socket_path), "token")
    other = AgentGuests(bridge.channel_socket, bridge.gateway_socket)
    assert await other.list_channels() == [BOX, "mmmmmmmmmmmm"], "whoever attached them"
    await bridge.close()
    bridge.gateway_socket.unlink(missing_ok=True)
    with pytest.raises(GuestUnreachableError) as refusal:
        await other.list_channels()
    assert refusal.value.code == "gateway_unreachable"
    await other.close()
