"""The guest's side of the channel over sockets that listen: whom it takes, and that the newest connection counts."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atelier.guest_agent import channel_sockets
from atelier.guest_agent.channel_sockets import has_vsock, is_host, serve_connections, serve_vsock

PATIENCE_SECONDS = 30
_LOOPBACK_CID = 1


def _no_vsock() -> str:
    """Why vsock cannot be had here, as words for a skip."""
    try:
        with socket.socket(socket.AF_VSOCK) as listener:
            listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
    except OSError as error:
        return f"no vsock in this kernel: {error.strerror}"
    return ""


async def _serve_echo(descriptor: int) -> bool:
    """What a channel's ``serve`` is: until the host hangs up."""
    loop = asyncio.get_running_loop()
    with socket.socket(fileno=socket.dup(descriptor)) as connection:
        connection.setblocking(False)
        with contextlib.suppress(ConnectionResetError):
            while received := await loop.sock_recv(connection, 100):
                await loop.sock_sendall(connection, received)
    return True


@contextlib.asynccontextmanager
async def _listening(path: Path, *, takes: bool) -> AsyncIterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        serving = asyncio.create_task(serve_connections(listener, _serve_echo, lambda address: takes))
        await asyncio.sleep(0)
        try:
            yield
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving


async def test_the_newest_connection_ends_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with asyncio.timeout(PATIENCE_SECONDS), _listening(path, takes=True):
        first, first_writer = await asyncio.open_unix_connection(str(path))
        first_writer.write(b"one")
        assert await first.readexactly(3) == b"one"
        second, second_writer = await asyncio.open_unix_connection(str(path))
        second_writer.write(b"two")
        assert await second.readexactly(3) == b"two"
        assert await first.read() == b""
        for writer in (first_writer, second_writer):
            writer.close()


async def test_who_is_not_the_host_is_hung_up_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    async with asyncio.timeout(PATIENCE_SECONDS), _listening(path, takes=False):
        reader, writer = await asyncio.open_unix_connection(str(path))
        assert await reader.read() == b""
        writer.close()
    assert "is not the host" in capsys.readouterr().err


def test_only_the_host_is_taken() -> None:
    assert is_host((socket.VMADDR_CID_HOST, 1024))
    for peer in (_LOOPBACK_CID, 3, socket.VMADDR_CID_ANY):
        assert not is_host((peer, 1024))


def test_a_virtio_vsock_is_found_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_sockets, "_DEVICES", str(tmp_path / "none"))
    assert not has_vsock()
    monkeypatch.setattr(channel_sockets, "_DEVICES", str(tmp_path))
    for number, kind in enumerate(("0x0002", "0x0003", "nonsense")):
        (tmp_path / f"virtio{number}").mkdir()
        (tmp_path / f"virtio{number}" / "device").write_text(f"{kind}\n")
    assert not has_vsock()
    (tmp_path / "virtio9").mkdir()
    (tmp_path / "virtio9" / "device").write_text("0x0013\n")
    assert has_vsock()


@pytest.mark.skipif(bool(_no_vsock()), reason=_no_vsock())
async def test_a_process_of_the_guest_itself_is_not_taken_over_vsock(capsys: pytest.CaptureFixture[str]) -> None:
    from atelier.guest_protocol import GUEST_CHANNEL_VSOCK_PORT

    serving = asyncio.create_task(serve_vsock(_serve_echo))
    await asyncio.sleep(0.1)
    if serving.done():
        pytest.skip(f"not applicable: vsock's port is taken: {serving.exception()}")
    try:
        with socket.socket(socket.AF_VSOCK) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            try:
                await asyncio.to_thread(connection.connect, (_LOOPBACK_CID, GUEST_CHANNEL_VSOCK_PORT))
            except OSError as error:
                if error.errno in (errno.ETIMEDOUT, errno.ENODEV, errno.ECONNRESET, errno.EHOSTUNREACH):
                    pytest.skip(f"not applicable: no loopback of vsock in this kernel: {error.strerror}")
                raise
            assert await asyncio.to_thread(connection.recv, 1) == b""
    finally:
        serving.cancel()
    assert "is not the host" in capsys.readouterr().err
