"""A stream of the guest channel as an asyncio transport, so that a server in the agent's own process gets an ordinary
``StreamReader`` and ``StreamWriter`` with real back-pressure, without a socket between.

Made by ``channel`` for the ports that the agent serves itself. Never copies more than one window ahead of its reader.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

from atelier.guest_agent.direct_reader import DirectReader
from atelier.guest_agent.output_pipes import OutputPipes
from atelier.guest_protocol.frames import CLOSED_DONE, CLOSED_RESET, MAX_PAYLOAD_BYTES
from atelier.guest_protocol.stream import Stream

StreamServer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_READER_LIMIT_BYTES: Final = 256 * 1024
_WRITE_HIGH_BYTES: Final = 256 * 1024
_NO_PAGES_MOVED: Final = (errno.EINVAL, errno.EAGAIN, errno.EMFILE, errno.ENFILE)
"""Of splice: the file's system cannot, or there is no pipe to be had."""


class _FilePart:
    """A part of a file on its way into a stream: moved by the kernel through the channel's pipes, or, where the file's
    system moves no pages, read straight into the frames that are written."""

    __slots__ = ("_descriptor", "_left_bytes", "_pipes", "_position", "sent")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pipes: OutputPipes, descriptor: int, first: int, length: int
    ) -> None:
        self._pipes: OutputPipes | None = pipes
        self._descriptor = descriptor
        self._position = first
        self._left_bytes = length
        self.sent: asyncio.Future[None] = loop.create_future()

    def pass_on(self, stream: Stream) -> None:
        """As much as the stream takes now."""
        while not self.sent.done():
            left = self._left_bytes
            if not left:
                self.sent.set_result(None)
                return
            try:
                count = self._move(stream, left) if self._pipes is not None else self._read(stream, left)
            except OSError as error:
                if self._pipes is not None and error.errno in _NO_PAGES_MOVED:
                    self._pipes = None
                    continue
                self.sent.set_exception(error)
                return
            if count is None:
                return
            if not count:
                # The length is promised already; a broken connection is the only honest end.
                self.sent.set_exception(ConnectionAbortedError("the file became shorter while it was read"))
                return
            self._position += count
            self._left_bytes = left - count

    def _move(self, stream: Stream, left: int) -> int | None:
        """How many bytes were sent, 0 at the file's end; None if the stream takes none now. Raises OSError."""
        wanted = min(left, MAX_PAYLOAD_BYTES)
        if not stream.takes_frame(wanted):
            return None
        assert self._pipes is not None
        while (
            count := self._pipes.take_frame(self._descriptor, self._position, wanted, stream.edges_of(wanted))
        ) < wanted:
            # A file that was cut.
            if not count:
                return 0
            wanted = count
        stream.send_piped(count)
        return count

    def _read(self, stream: Stream, left: int) -> int | None:
        """As ``_move``."""
        frame = stream.borrow_frame(left)
        if frame is None:
            return None
        payload = frame.payload
        count = os.preadv(self._descriptor, [payload if left >= len(payload) else payload[:left]], self._position)
        if count:
            stream.send_frame(frame, count)
        return count


class LocalTransport(asyncio.Transport):
    """Both the StreamEnd of one stream and the transport of one asyncio protocol."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, stream: Stream, protocol: asyncio.Protocol, pipes: OutputPipes
    ) -> None:
        super().__init__({"peername": ("guest-channel", stream.identifier), "sockname": ("guest-channel", stream.port)})
        self._loop = loop
        self._stream = stream
        self._protocol = protocol
        self._pipes = pipes
        self._paused = False
        self._held_bytes = 0
        self._pending: deque[memoryview] = deque()
        self._pending_bytes = 0
        self._file: _FilePart | None = None
        self._high_bytes = _WRITE_HIGH_BYTES
        self._low_bytes = _WRITE_HIGH_BYTES // 4
        self._protocol_paused = False
        self._end_asked = False
        self._closing = False
        self._lost = False
        protocol.connection_made(self)

    # The stream's side.

    def opened(self) -> None:
        raise RuntimeError("the guest opens no streams")

    def received(self, payload: memoryview) -> None:
        count = len(payload)
        if self._closing:
            self._stream.consumed(count)
            return
        self._protocol.data_received(payload)  # type: ignore[arg-type]
        if self._paused:
            self._held_bytes += count
        else:
            self._stream.consumed(count)

    def received_end(self) -> None:
        if not self._closing and not self._protocol.eof_received():
            self.close()

    def closed(self, reason: int) -> None:
        self._lose(None if reason == CLOSED_DONE else ConnectionResetError("the stream was reset"))

    def may_send(self) -> None:
        while self._pending:
            room = self._stream.sendable_bytes()
            if room == 0:
                break
            first = self._pending[0]
            if len(first) <= room:
                self._stream.send(first)
                self._pending.popleft()
                self._pending_bytes -= len(first)
            else:
                self._stream.send(first[:room])
                self._pending[0] = first[room:]
                self._pending_bytes -= room
        if self._protocol_paused and self._pending_bytes <= self._low_bytes:
            self._protocol_paused = False
            self._protocol.resume_writing()
        if not self._pending:
            if self._file is not None:
                self._file.pass_on(self._stream)
            elif self._closing:
                self._stream.close(CLOSED_DONE)
                self._lose(None)
            elif self._end_asked:
                self._stream.send_end()

    def _lose(self, error: Exception | None) -> None:
        self._closing = True
        self._pending.clear()
        self._pending_bytes = 0
        if self._file is not None and not self._file.sent.done():
            self._file.sent.set_exception(error or ConnectionResetError("the peer closed the stream"))
        if not self._lost:
            self._lost = True
            self._loop.call_soon(self._protocol.connection_lost, error)

    # The server's side.

    async def send_file(self, descriptor: int, first: int, length: int) -> None:
        """Send a part of a file behind what was written before, and return when it has been queued whole. Nothing else
        may be written meanwhile. Raises OSError: of the file, or ConnectionError when the stream ends before."""
        if self._closing or self._end_asked:
            raise ConnectionResetError("the stream is closed")
        part = self._file = _FilePart(self._loop, self._pipes, descriptor, first, length)
        try:
            self.may_send()
            await part.sent
        finally:
            self._file = None

    # The protocol's side: asyncio.Transport.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing or self._end_asked or not data:
            return
        stream = self._stream
        if not self._pending:
            room = stream.sendable_bytes()
            if len(data) <= room:
                stream.send(data if not isinstance(data, bytearray) else memoryview(data))
                return
        # What waits must be ours: the caller may reuse its memory.
        kept = memoryview(data if isinstance(data, bytes) else bytes(data))
        self._pending.append(kept)
        self._pending_bytes += len(kept)
        self.may_send()
        if self._pending_bytes > self._high_bytes and not self._protocol_paused:
            self._protocol_paused = True
            self._protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self.write(data)

    def write_eof(self) -> None:
        if not self._end_asked and not self._closing:
            self._end_asked = True
            self.may_send()

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.may_send()

    def abort(self) -> None:
        if not self._lost:
            self._stream.close(CLOSED_RESET)
            self._lose(None)

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        held, self._held_bytes = self._held_bytes, 0
        if held:
            self._stream.consumed(held)

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high_bytes = _WRITE_HIGH_BYTES if high is None else high
        self._low_bytes = self._high_bytes // 4 if low is None else low

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low_bytes, self._high_bytes

    def get_write_buffer_size(self) -> int:
        return self._pending_bytes

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        if not isinstance(protocol, asyncio.Protocol):
            raise TypeError("a streaming protocol is needed")
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol


def serve_locally(
    loop: asyncio.AbstractEventLoop, stream: Stream, server: StreamServer, pipes: OutputPipes
) -> asyncio.Task[None]:
    """Hand ``stream`` to ``server`` in a task of its own; what it raises is written to stderr and ends its stream.
    ``pipes`` are those of the channel whose stream it is."""
    reader = DirectReader(limit=_READER_LIMIT_BYTES, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport = LocalTransport(loop, stream, protocol, pipes)
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)

    async def run() -> None:
        try:
            await server(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception:
            traceback.print_exc(file=sys.stderr)
            transport.abort()
        finally:
            writer.close()

    stream.accept()
    stream.end = transport
    return loop.create_task(run())
