"""The host's end of one guest channel: connects to the VMM's socket, opens epochs, keeps the guest within its bounds.

Made by ``control`` for each attached sandbox; ``clients`` open streams on it. Everything read here is hostile. A channel
takes at most so many bytes and frames per turn of the event loop, a flood of tiny frames also pauses between its
turns, and who breaks the protocol is disconnected, with a growing pause before the next attempt. It must never let a
guest delay another channel, nor keep more for a guest than the windows of its streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from pathlib import Path
from typing import Final, Literal

from atelier.gateway.vsock import connect_to_port
from atelier.guest_protocol import GUEST_CHANNEL_VSOCK_PORT, PROTOCOL_VERSION
from atelier.guest_protocol.frames import (
    HELLO,
    HELLO_ACK,
    KNOCK,
    MAX_FRAME_BYTES,
    NO_NONCE,
    NONCE_BYTES,
    PADDING,
    Greeting,
    LostSync,
    ProtocolViolation,
    encode_greeting,
)
from atelier.guest_protocol.multiplexer import Multiplexer
from atelier.guest_protocol.stream import Stream, StreamEnd
from atelier.host.unix_sockets import connect_exactly

log = logging.getLogger(__name__)

ChannelState = Literal["connecting", "greeting", "open", "broken"]

MAX_STREAMS: Final = 512

_READ_BYTES_PER_TURN: Final = 256 * 1024
_WRITE_BYTES_PER_TURN: Final = 512 * 1024
_FRAMES_PER_TURN: Final = 256
_FLOOD_PAUSE_SECONDS: Final = 0.002
"""After a turn that ended for its number of frames. Bulk data in full frames never gets there."""

_CONNECT_MIN_SECONDS: Final = 0.005
_CONNECT_MAX_SECONDS: Final = 0.25
_BROKEN_MIN_SECONDS: Final = 0.05
_BROKEN_MAX_SECONDS: Final = 5.0
_GOOD_EPOCH_SECONDS: Final = 10.0
"""An epoch that lasted this long forgives what was before it."""

_HELLO_AGAIN_SECONDS: Final = 3.0
_MAX_SKIPPED_BYTES: Final = 16 * 1024 * 1024
"""More than QEMU and a guest kernel can hold for us of an earlier epoch (128 buffers of 32 KiB)."""
_MAX_STRAY_GREETINGS: Final = 64
_MAX_RESTARTS: Final = 5
"""Epochs that the guest may end by itself (its agent died and came back) before the pauses between them grow."""


class GuestChannel:
    """``run`` lives as long as the sandbox is attached. ``is_vsock``: the socket is Firecracker's, which is asked for the guest's
    port first. ``state`` and the counters are for people."""

    def __init__(self, sandbox_id: str, vmm_socket: Path, token: str, *, is_vsock: bool = False) -> None:
        self.sandbox_id = sandbox_id
        self.vmm_socket = vmm_socket
        self._is_vsock = is_vsock
        self.token = token
        self.state: ChannelState = "connecting"
        self.last_error = ""
        """Why it is not open; empty while it is."""
        self.last_violation = ""
        """What the guest did wrong last; kept when the channel is open again."""
        self.epochs = 0
        self.violations = 0
        self.received_bytes = 0
        self.sent_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._opened = asyncio.Event()
        self._multiplexer = Multiplexer(
            on_output=self._schedule_flush,
            on_greeting=self._greeted,
            max_streams=MAX_STREAMS,
            buffer_bytes=3 * MAX_FRAME_BYTES,
        )
        self._connection: socket.socket | None = None
        self._left: asyncio.Future[str | None] | None = None
        self._reading = False
        self._writing = False
        self._turn: asyncio.Handle | None = None
        self._flushing: asyncio.Handle | None = None
        self._hello_timer: asyncio.TimerHandle | None = None
        self._nonce = NO_NONCE
        self._echo = NO_NONCE
        self._opened_at = 0.0
        self._skipped_bytes = 0
        self._stray_greetings = 0
        self._restarts = 0

    @property
    def stream_count(self) -> int:
        return self._multiplexer.stream_count

    @property
    def frames_received(self) -> int:
        return self._multiplexer.frames_received

    async def wait_open(self, timeout_seconds: float) -> bool:
        """Whether an epoch is open, now or within ``timeout_seconds``."""
        if not self._opened.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self._opened.wait()
        return self._opened.is_set()

    def open_stream(self, port: int, end: StreamEnd) -> Stream | None:
        """A new stream to the guest's ``port``; None if there is no epoch or no room."""
        return self._multiplexer.open(port, end)

    async def run(self) -> None:
        """Keep the channel up until cancelled."""
        broken_seconds = _BROKEN_MIN_SECONDS
        connect_seconds = _CONNECT_MIN_SECONDS
        try:
            while True:
                try:
                    connection = await self._connect()
                except OSError as error:
                    self.last_error = f"cannot connect to the VMM: {error.strerror or error}"
                    await asyncio.sleep(connect_seconds)
                    connect_seconds = min(connect_seconds * 1.5, _CONNECT_MAX_SECONDS)
                    continue
                self._opened_at = 0.0
                broke = await self._serve(connection)
                if self._opened_at and time.monotonic() - self._opened_at >= _GOOD_EPOCH_SECONDS:
                    broken_seconds = _BROKEN_MIN_SECONDS
                    connect_seconds = _CONNECT_MIN_SECONDS
                if broke is None:
                    self.state = "connecting"
                    self.last_error = "the VMM closed the channel"
                    await asyncio.sleep(connect_seconds)
                    connect_seconds = min(connect_seconds * 1.5, _CONNECT_MAX_SECONDS)
                    continue
                self.state = "broken"
                self.last_error = self.last_violation = broke
                self.violations += 1
                log.warning("guest channel of %s: %s; next attempt in %.2f s", self.sandbox_id, broke, broken_seconds)
                await asyncio.sleep(broken_seconds)
                broken_seconds = min(broken_seconds * 2, _BROKEN_MAX_SECONDS)
        finally:
            self._opened.clear()
            self._multiplexer.end_epoch()
            self._free_memory()

    async def _connect(self) -> socket.socket:
        if self._is_vsock:
            return await connect_to_port(self.vmm_socket, GUEST_CHANNEL_VSOCK_PORT)
        return await connect_exactly(self.vmm_socket)

    def _free_memory(self) -> None:
        """At once. Channel and multiplexer know each other, and the garbage collector, which counts objects and not
        bytes, comes by after many more sandboxes."""
        buffer = self._multiplexer.receive_buffer
        buffer.view.release()
        buffer.memory.clear()

    async def _serve(self, connection: socket.socket) -> str | None:
        """Speak until the connection ends. Returns what the guest did wrong, None if the VMM hung up."""
        self._connection = connection
        self._left = self._loop.create_future()
        self._multiplexer.receive_buffer.clear()
        self._echo = NO_NONCE
        self._restarts = 0
        try:
            self._read_on()
            self._greet()
            return await self._left
        finally:
            self._let_go(connection)

    def _let_go(self, connection: socket.socket) -> None:
        self._opened.clear()
        self._left = None
        self._connection = None
        for handle in (self._turn, self._flushing, self._hello_timer):
            if handle is not None:
                handle.cancel()
        self._turn = self._flushing = self._hello_timer = None
        if self._reading:
            self._reading = False
            self._loop.remove_reader(connection)
        if self._writing:
            self._writing = False
            self._loop.remove_writer(connection)
        connection.close()
        self._multiplexer.end_epoch()

    def _leave(self, broke: str | None) -> None:
        if self._left is not None and not self._left.done():
            self._opened.clear()
            self._multiplexer.end_epoch()
            self._left.set_result(broke)

    # The greeting.

    def _greet(self) -> None:
        """Begin anew: whatever either side was in the middle of, the guest finds this HELLO."""
        self.state = "greeting"
        self._opened.clear()
        self._skipped_bytes = 0
        self._stray_greetings = 0
        self._multiplexer.end_epoch()
        self._say_hello()

    def _say_hello(self) -> None:
        self._nonce = os.urandom(NONCE_BYTES)
        self._multiplexer.put_raw(PADDING)
        hello = Greeting(HELLO, PROTOCOL_VERSION, self._nonce, self._echo, self.token)
        self._multiplexer.put_raw(encode_greeting(hello))
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        self._hello_timer = self._loop.call_later(_HELLO_AGAIN_SECONDS, self._say_hello_again)

    def _say_hello_again(self) -> None:
        self._hello_timer = None
        if self._multiplexer.output_bytes == 0:
            self._say_hello()
        else:
            # Nobody has read the last one yet: a guest that still boots, or a paused one.
            self._hello_timer = self._loop.call_later(_HELLO_AGAIN_SECONDS, self._say_hello_again)

    def _greeted(self, greeting: Greeting) -> None:
        if greeting.kind == KNOCK:
            self._knocked(greeting.nonce)
            return
        if greeting.kind != HELLO_ACK or self.state != "greeting" or greeting.nonce != self._nonce:
            self._count_stray_greeting()
            return
        if not max(1, PROTOCOL_VERSION - 1) <= greeting.version <= PROTOCOL_VERSION:
            raise ProtocolViolation(
                f"the guest agent speaks protocol {greeting.version}, this gateway {PROTOCOL_VERSION} and the one before"
            )
        if self._hello_timer is not None:
            self._hello_timer.cancel()
            self._hello_timer = None
        self._multiplexer.begin_epoch(self._nonce, greeting.version)
        self.state = "open"
        self.last_error = ""
        self.epochs += 1
        self._opened_at = time.monotonic()
        self._opened.set()

    def _knocked(self, nonce: bytes) -> None:
        self._echo = nonce
        if self.state == "open":
            self._restart()
        else:
            self._count_stray_greeting()
            self._say_hello()

    def _restart(self) -> None:
        """The guest agent is a new one, or has lost the stream."""
        if time.monotonic() - self._opened_at >= _GOOD_EPOCH_SECONDS:
            self._restarts = 0
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise ProtocolViolation("the guest agent ends one epoch after the other")
        self._greet()

    def _count_stray_greeting(self) -> None:
        self._stray_greetings += 1
        if self._stray_greetings > _MAX_STRAY_GREETINGS:
            raise ProtocolViolation("greetings without end")

    # Reading.

    def _read_on(self) -> None:
        if not self._reading and self._connection is not None:
            self._reading = True
            self._loop.add_reader(self._connection, self._on_readable)

    def _on_readable(self) -> None:
        connection = self._connection
        if connection is None:
            return
        multiplexer = self._multiplexer
        try:
            count = connection.recv_into(multiplexer.receive_buffer.space()[:_READ_BYTES_PER_TURN])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._leave(None)
            return
        if count == 0:
            self._leave(None)
            return
        self.received_bytes += count
        multiplexer.receive_buffer.received(count)
        self._take_turn()

    def _take_turn(self) -> None:
        self._turn = None
        if self._connection is None:
            return
        multiplexer = self._multiplexer
        try:
            try:
                more = multiplexer.process(_FRAMES_PER_TURN)
            except LostSync:
                # Padding of a new guest agent, most likely: its KNOCK follows.
                self._restart()
                more = True
            if not multiplexer.epoch:
                self._skipped_bytes += multiplexer.skipped_bytes
                multiplexer.skipped_bytes = 0
                if self._skipped_bytes > _MAX_SKIPPED_BYTES:
                    raise ProtocolViolation("bytes without end instead of an answer to HELLO")
        except ProtocolViolation as violation:
            self._leave(str(violation))
            return
        if not more:
            self._read_on()
            return
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._connection)
        self._turn = self._loop.call_later(_FLOOD_PAUSE_SECONDS, self._take_turn)

    # Writing.

    def _schedule_flush(self) -> None:
        if self._flushing is None and not self._writing and self._connection is not None:
            self._flushing = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        connection, multiplexer = self._connection, self._multiplexer
        if connection is None:
            return
        budget = _WRITE_BYTES_PER_TURN
        while budget > 0:
            pieces = multiplexer.next_pieces()
            if not pieces:
                break
            try:
                count = connection.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(connection, self._flush)
                return
            except OSError:
                self._leave(None)
                return
            multiplexer.wrote(count)
            self.sent_bytes += count
            budget -= count
            multiplexer.offer_room()
        if not multiplexer.output_bytes:
            if self._writing:
                self._writing = False
                self._loop.remove_writer(connection)
        elif not self._writing:
            self._schedule_flush()
