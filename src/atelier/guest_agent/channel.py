"""The guest's side of the guest channel: owns the virtio-serial port named ``atelier``, or listens on the guest's vsock
where the machine has one, for as long as the agent runs.

Called by the guest agent's ``__main__``. A stream to a port in ``local`` is handed over in-process; one to any other
port is connected to the guest's own loopback. It opens no streams, listens on no network, and imports little, since
it stands between the boot and the first answer.

Linux's virtio port has three traits that shape this code. One read gives at most one 4 KiB buffer, but a readv of
4 KiB pieces gives as many as have come. One write takes at most 32 KiB. And while the host's side is closed, read
gives 0 and poll says "readable" without end, so an edge-triggered epoll waits for the host's return.
Source: Linux drivers/char/virtio_console.c.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

from atelier.guest_agent.channel_sockets import VSOCK, has_vsock, serve_connections, serve_vsock
from atelier.guest_agent.local_stream import StreamServer, serve_locally
from atelier.guest_agent.output_pipes import OutputPipes
from atelier.guest_protocol import PROTOCOL_VERSION
from atelier.guest_protocol.frames import (
    CLOSED_REFUSED,
    CLOSED_UNREACHABLE,
    HELLO,
    HELLO_ACK,
    KNOCK,
    NONCE_BYTES,
    PADDING,
    PORT_WRITE_BYTES,
    Greeting,
    LostSync,
    ProtocolViolation,
    encode_greeting,
)
from atelier.guest_protocol.multiplexer import Multiplexer
from atelier.guest_protocol.output_queue import Piece
from atelier.guest_protocol.splice import SocketSplice
from atelier.guest_protocol.stream import Stream

PORT_NAME: Final = "atelier"
UNIX_PREFIX: Final = "unix:"
"""``unix:/path`` instead of a device: listen there, as a VMM's character device does. For tests without a VM."""

_CLASS_DIRECTORY: Final = Path("/sys/class/virtio-ports")
_PIECE_BYTES: Final = 4096
_FEW_PIECES: Final = 4
_MANY_PIECES: Final = 64
_READ_BYTES_PER_TURN: Final = 512 * 1024
_WRITE_BYTES_PER_TURN: Final = 1024 * 1024
_KNOCK_AGAIN_SECONDS: Final = 1.0
_NO_MEMORY_PAUSE_SECONDS: Final = 0.01
Connector = Callable[[], Awaitable[socket.socket]]
"""Returns a connected socket, non-blocking and now the caller's. Raises OSError."""

_LOOPBACK: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


async def run_channel(
    port_path: str | None,
    local: Mapping[int, StreamServer],
    on_token: Callable[[str], None] | None = None,
    connectors: Mapping[int, Connector] | None = None,
) -> None:
    """Serve the guest channel for ever (until cancelled).

    ``port_path``: the device, ``vsock``, ``unix:/path``, or None: find the port named ``atelier`` or a vsock (and wait
    for either to appear).
    ``local`` maps a port to the coroutine function that serves a stream to it, ``connectors`` to the one that returns the
    socket that its stream is joined with, in place of a server's on the loopback. ``on_token`` gets the sandbox's token
    at the begin of each epoch; it comes from the host only.
    """
    channel = _GuestChannel(local, on_token, connectors or {})
    try:
        if port_path is not None and port_path.startswith(UNIX_PREFIX):
            await _serve_unix(channel, port_path.removeprefix(UNIX_PREFIX))
        while True:
            path = port_path or await _find_port()
            await (serve_vsock(channel.serve) if path == VSOCK else _serve_device(channel, path))
    finally:
        channel.end()


async def _serve_unix(channel: _GuestChannel, path: str) -> None:
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        await serve_connections(listener, channel.serve, lambda address: True)


async def _serve_device(channel: _GuestChannel, path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # Just plugged and not ready, or another agent that is about to end still has it.
        print(f"guest channel: cannot open {path}: {error.strerror}", file=sys.stderr)
        await asyncio.sleep(0.2)
        return
    try:
        if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is no character device")
        while await channel.serve(descriptor):
            await _host_returns(descriptor)
    finally:
        os.close(descriptor)
    await asyncio.sleep(0.05)


async def _find_port() -> str:
    """The device of the port named ``atelier``, or ``VSOCK``. devtmpfs makes no such name without udev, so sysfs is
    asked."""
    pause_seconds = 0.005
    while True:
        if has_vsock():
            return VSOCK
        for candidate in _CLASS_DIRECTORY.glob("*/name"):
            try:
                found = candidate.read_text().strip() == PORT_NAME
            except OSError:
                continue
            device = f"/dev/{candidate.parent.name}"
            if found and Path(device).exists():
                return device
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 1.5, 0.25)


async def _host_returns(descriptor: int) -> None:
    """Wait until the host's side of the port is open, without spinning on the standing POLLHUP."""
    loop = asyncio.get_running_loop()
    with select.epoll() as edges:
        edges.register(descriptor, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        while True:
            returned = asyncio.Event()
            loop.add_reader(edges.fileno(), returned.set)
            try:
                await returned.wait()
            finally:
                loop.remove_reader(edges.fileno())
            for _, events in edges.poll(0):
                if not events & select.EPOLLHUP or events & select.EPOLLERR:
                    return


def _cut(pieces: list[Piece]) -> list[Piece]:
    """The same bytes in pieces that the kernel takes whole: a writev goes on only behind a piece that was."""
    cut: list[Piece] = []
    for piece in pieces:
        if len(piece) <= PORT_WRITE_BYTES:
            cut.append(piece)
        else:
            view = memoryview(piece)
            cut += [view[at : at + PORT_WRITE_BYTES] for at in range(0, len(piece), PORT_WRITE_BYTES)]
    return cut


class _GuestChannel:
    """The state that outlives a connection of the host's: the byte stream goes on where it was."""

    def __init__(
        self,
        local: Mapping[int, StreamServer],
        on_token: Callable[[str], None] | None,
        connectors: Mapping[int, Connector],
    ) -> None:
        self._local = local
        self._connectors = connectors
        self._on_token = on_token
        self._loop = asyncio.get_running_loop()
        self._pipes = OutputPipes()
        self._multiplexer = Multiplexer(
            on_output=self._schedule_flush,
            on_greeting=self._greeted,
            accept=self._accept_stream,
            on_forgotten=self._pipes.forget,
        )
        self._descriptor = -1
        self._left: asyncio.Future[bool] | None = None
        self._flushing: asyncio.Handle | None = None
        self._writing = False
        self._pieces = _FEW_PIECES
        # A fresh agent may stand in the middle of what its predecessor was sent: it takes only a HELLO that answers
        # its KNOCK, so that nobody's data can pose as one.
        self._dirty = True
        self._knock_nonce = os.urandom(NONCE_BYTES)
        self._knock_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, descriptor: int) -> bool:
        """Serve until the host's side closes (True) or the port is gone (False)."""
        self._descriptor = descriptor
        self._left = self._loop.create_future()
        self._loop.add_reader(descriptor, self._on_readable)
        # First see what there is: nothing read and the host not there means that nothing of old can follow.
        self._on_readable()
        if self._dirty and not self._left.done():
            self._knock(with_padding=True)
        try:
            return await self._left
        finally:
            self._let_go()

    def end(self) -> None:
        self._multiplexer.end_epoch()
        for task in self._tasks:
            task.cancel()

    def _let_go(self) -> None:
        for handle in (self._flushing, self._knock_timer):
            if handle is not None:
                handle.cancel()
        self._flushing = self._knock_timer = None
        self._loop.remove_reader(self._descriptor)
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._descriptor)
        self._descriptor = -1

    def _leave(self, port_is_there: bool) -> None:
        if self._left is not None and not self._left.done():
            self._multiplexer.end_epoch()
            self._multiplexer.receive_buffer.clear()
            # What is read from now on comes from a new connection, from its first byte.
            self._dirty = False
            self._left.set_result(port_is_there)

    # Reading.

    def _on_readable(self) -> None:
        self._read_turn()
        if self._flushing is not None:
            # At once instead of in the next turn of the loop, which costs an emulated guest some 0.1 ms.
            self._flushing.cancel()
            self._flush()

    def _read_turn(self) -> None:
        multiplexer = self._multiplexer
        buffer = multiplexer.receive_buffer
        budget = _READ_BYTES_PER_TURN
        while budget > 0 and self._left is not None and not self._left.done():
            space = buffer.space()
            limit = min(len(space), self._pieces * _PIECE_BYTES)
            try:
                count = os.readv(
                    self._descriptor, [space[at : at + _PIECE_BYTES] for at in range(0, limit, _PIECE_BYTES)]
                )
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._leave(False)
                return
            if count == 0:
                self._leave(True)
                return
            self._pieces = _MANY_PIECES if count == limit else _FEW_PIECES
            budget -= count
            buffer.received(count)
            self._process()

    def _process(self) -> None:
        multiplexer = self._multiplexer
        try:
            multiplexer.process()
        except (LostSync, ProtocolViolation) as error:
            self._lose_sync(error)
        if not multiplexer.epoch and not multiplexer.skipped_only_zeros and not self._dirty:
            self._dirty = True
            self._knock_nonce = os.urandom(NONCE_BYTES)
            self._knock(with_padding=True)

    def _lose_sync(self, error: Exception) -> None:
        """Usual after a host's side that died inside a frame: zeros and a HELLO follow."""
        if isinstance(error, ProtocolViolation):
            print(f"guest channel: the host broke the protocol: {error}", file=sys.stderr)
        self._multiplexer.end_epoch()
        try:
            self._multiplexer.process()
        except ProtocolViolation as violation:
            print(f"guest channel: {violation}", file=sys.stderr)

    def _knock(self, *, with_padding: bool) -> None:
        self._knock_timer = None
        if not self._dirty or self._descriptor < 0:
            return
        if with_padding:
            self._multiplexer.put_raw(PADDING)
        if with_padding or self._multiplexer.output_bytes == 0:
            self._multiplexer.put_raw(encode_greeting(Greeting(KNOCK, PROTOCOL_VERSION, self._knock_nonce)))
        self._knock_timer = self._loop.call_later(_KNOCK_AGAIN_SECONDS, lambda: self._knock(with_padding=False))

    def _greeted(self, greeting: Greeting) -> None:
        if greeting.kind != HELLO:
            return
        if self._dirty and greeting.echo != self._knock_nonce:
            return
        self._dirty = False
        multiplexer = self._multiplexer
        version = min(greeting.version, PROTOCOL_VERSION)
        if version < max(1, PROTOCOL_VERSION - 1):
            # The host learns from the answer which version this side speaks, and says so to its people.
            multiplexer.end_epoch()
            multiplexer.put_raw(encode_greeting(Greeting(HELLO_ACK, PROTOCOL_VERSION, greeting.nonce)))
            return
        multiplexer.begin_epoch(greeting.nonce, version)
        if self._on_token is not None:
            self._on_token(greeting.token)
        multiplexer.put_raw(encode_greeting(Greeting(HELLO_ACK, version, greeting.nonce)))

    # Writing.

    def _schedule_flush(self) -> None:
        if self._flushing is None and not self._writing and self._descriptor >= 0:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        multiplexer = self._multiplexer
        budget = _WRITE_BYTES_PER_TURN
        while budget > 0 and self._descriptor >= 0:
            piped = multiplexer.next_piped()
            pieces = [] if piped else multiplexer.next_pieces()
            if not piped and not pieces:
                break
            try:
                if piped:
                    count = self._pipes.give_to(self._descriptor, piped)
                elif len(pieces) == 1 and len(pieces[0]) <= PORT_WRITE_BYTES:
                    count = os.write(self._descriptor, pieces[0])
                else:
                    count = os.writev(self._descriptor, _cut(pieces))
            except (BlockingIOError, InterruptedError):
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._descriptor, self._flush)
                return
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    self._stop_writing()
                    self._flushing = self._loop.call_later(_NO_MEMORY_PAUSE_SECONDS, self._flush)
                    return
                # The reading side sees the same, and what was sent before it, and decides.
                self._multiplexer.end_epoch()
                break
            multiplexer.wrote(count)
            budget -= count
            multiplexer.offer_room()
        if not multiplexer.output_bytes:
            self._stop_writing()
        elif not self._writing and self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._descriptor)

    # Streams.

    def _accept_stream(self, stream: Stream) -> None:
        server = self._local.get(stream.port)
        if server is not None:
            self._track(serve_locally(self._loop, stream, server, self._pipes))
            return
        splice = SocketSplice(self._loop)
        stream.end = splice
        splice.join(stream)
        connector = self._connectors.get(stream.port)
        connecting = self._connect(stream, splice) if connector is None else self._connect_by(connector, stream, splice)
        self._track(self._loop.create_task(connecting))

    def _track(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect_by(self, connector: Connector, stream: Stream, splice: SocketSplice) -> None:
        try:
            connected = await connector()
        except ConnectionRefusedError:
            splice.finish(CLOSED_REFUSED)
        except OSError:
            splice.finish(CLOSED_UNREACHABLE)
        else:
            stream.accept()
            splice.attach(connected)

    async def _connect(self, stream: Stream, splice: SocketSplice) -> None:
        reason = CLOSED_UNREACHABLE
        for family, address in _LOOPBACK:
            try:
                connecting = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            except OSError:
                continue
            connecting.setblocking(False)
            try:
                await self._loop.sock_connect(connecting, (address, stream.port))
                connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except ConnectionRefusedError:
                reason = CLOSED_REFUSED
                connecting.close()
            except OSError:
                connecting.close()
            except BaseException:
                connecting.close()
                raise
            else:
                stream.accept()
                splice.attach(connecting)
                return
        splice.finish(reason)
