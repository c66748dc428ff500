"""Joins a connected socket with a stream of the guest channel, both ways, with back-pressure and half close.

Used by the gateway (the socket is a client's) and by the guest agent (the socket leads to a server in the guest).
It keeps at most one window of bytes per stream, in one piece, however small the frames were that brought them.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import Callable
from typing import Final

from atelier.guest_protocol.frames import CLOSED_DONE, CLOSED_RESET
from atelier.guest_protocol.stream import Stream

_READS_PER_TURN: Final = 2
_SEND_BYTES: Final = 256 * 1024
_LINGER_RESET: Final = struct.pack("ii", 1, 0)


class SocketSplice:
    """A StreamEnd over a socket. Until ``attach`` gives it the socket, bytes from the stream wait (within the window).

    ``on_opened`` is called when the peer accepts the stream, ``on_gone(reason)`` exactly once, when the splice has let
    go of stream and socket.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        on_opened: Callable[[], None] | None = None,
        on_gone: Callable[[int], None] | None = None,
    ) -> None:
        self._loop = loop
        self._on_opened = on_opened
        self._on_gone = on_gone
        self._stream: Stream | None = None
        self._socket: socket.socket | None = None
        self._backlog = bytearray()
        self._early = b""
        self._passed_on_bytes = 0
        self._stalled_at = -1
        self._reading = False
        self._writing = False
        self._socket_ended = False
        self._stream_ended = False
        self._stream_closed = False
        self._gone = False

    def join(self, stream: Stream, early: bytes = b"") -> None:
        """The stream that this splice is the end of. ``early`` are bytes for it that came before the socket did."""
        self._stream = stream
        self._early = early
        self._pass_on_early()

    def attach(self, connected: socket.socket) -> None:
        """Give the splice its socket (non-blocking, now the splice's to close)."""
        if self._gone:
            connected.close()
            return
        self._socket = connected
        self._pass_on_early()
        self._flush_backlog()

    def drop_if_hung_up(self) -> None:
        """Let go if the client of a unix socket has gone while it was not read from. To be called every few seconds:
        an event loop cannot wait for this without spinning."""
        connected = self._socket
        if connected is None or self._reading or connected.family != socket.AF_UNIX or not _is_hung_up(connected):
            self._stalled_at = -1
        elif self._socket_ended:
            # It had only ended its sending before.
            if not self._stream_ended:
                self.finish(CLOSED_DONE)
        elif self._stalled_at == self._passed_on_bytes:
            # What it has left behind is not taken, and nobody waits for an answer.
            self.finish(CLOSED_RESET)
        else:
            self._stalled_at = self._passed_on_bytes

    def finish(self, reason: int) -> None:
        """Let go of both sides at once; ``reason`` is told to the peer, and to ``on_gone``."""
        if self._gone:
            return
        self._gone = True
        if self._stream is not None:
            self._stream.close(reason)
        connected, self._socket = self._socket, None
        if connected is not None:
            if self._reading:
                self._loop.remove_reader(connected)
            if self._writing:
                self._loop.remove_writer(connected)
            if reason == CLOSED_RESET and connected.family != socket.AF_UNIX:
                # The peer's connection broke; a plain close would make a cut stream look complete.
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            connected.close()
        self._backlog = bytearray()
        if self._on_gone is not None:
            self._on_gone(reason)

    # From the socket to the stream.

    def may_send(self) -> None:
        self._pass_on_early()

    def _pass_on_early(self) -> None:
        stream = self._stream
        while self._early and stream is not None:
            room = stream.sendable_bytes()
            if room == 0:
                return
            stream.send(self._early[:room])
            self._early = self._early[room:]
        self._read_on()

    def _read_on(self) -> None:
        if not self._reading and not self._socket_ended and self._socket is not None:
            self._reading = True
            self._loop.add_reader(self._socket, self._on_readable)

    def _stop_reading(self) -> None:
        if self._reading and self._socket is not None:
            self._reading = False
            self._loop.remove_reader(self._socket)

    def _on_readable(self) -> None:
        stream, connected = self._stream, self._socket
        if stream is None or connected is None:
            return
        for _ in range(_READS_PER_TURN):
            room = stream.sendable_bytes()
            if room == 0:
                self._stop_reading()
                return
            try:
                received = connected.recv(room)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.finish(CLOSED_RESET)
                return
            if not received:
                self._on_socket_end(stream, connected)
                return
            stream.send(received)
            self._passed_on_bytes += len(received)
            if len(received) < room:
                return

    def _on_socket_end(self, stream: Stream, connected: socket.socket) -> None:
        self._socket_ended = True
        self._stop_reading()
        if self._stream_ended and not self._backlog:
            self.finish(CLOSED_DONE)
        elif connected.family == socket.AF_UNIX and _is_hung_up(connected):
            # Not a half close: nobody is left to read what the guest would still send.
            self.finish(CLOSED_DONE)
        else:
            stream.send_end()

    # From the stream to the socket.

    def opened(self) -> None:
        if self._on_opened is not None:
            self._on_opened()

    def received(self, payload: memoryview) -> None:
        connected, stream = self._socket, self._stream
        if stream is None or self._gone:
            return
        if self._backlog or connected is None:
            self._backlog += payload
            return
        try:
            sent = connected.send(payload)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.finish(CLOSED_RESET)
            return
        if sent < len(payload):
            self._backlog += payload[sent:]
            self._write_on()
        if sent:
            stream.consumed(sent)

    def received_end(self) -> None:
        self._stream_ended = True
        if not self._backlog:
            self._pass_on_end()

    def closed(self, reason: int) -> None:
        self._stream_closed = True
        if reason == CLOSED_DONE and self._backlog:
            self._stop_reading()
            self._stream_ended = self._socket_ended = True
            return
        self.finish(reason)

    def _write_on(self) -> None:
        if not self._writing and self._socket is not None:
            self._writing = True
            self._loop.add_writer(self._socket, self._flush_backlog)

    def _flush_backlog(self) -> None:
        connected, stream = self._socket, self._stream
        if connected is None or stream is None:
            return
        if self._backlog:
            try:
                with memoryview(self._backlog) as whole, whole[:_SEND_BYTES] as piece:
                    sent = connected.send(piece)
            except (BlockingIOError, InterruptedError):
                self._write_on()
                return
            except OSError:
                self.finish(CLOSED_RESET)
                return
            del self._backlog[:sent]
            stream.consumed(sent)
            if self._backlog:
                self._write_on()
                return
        if self._writing:
            self._writing = False
            self._loop.remove_writer(connected)
        if self._stream_ended:
            self._pass_on_end()

    def _pass_on_end(self) -> None:
        if self._socket is None:
            return
        if self._socket_ended or self._stream_closed:
            self.finish(CLOSED_DONE)
            return
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.finish(CLOSED_RESET)


def _is_hung_up(connected: socket.socket) -> bool:
    """Whether the other end of a unix socket is closed, and not only shut down for writing."""
    poll = select.poll()
    poll.register(connected, 0)
    return bool(poll.poll(0))
