"""One end of one guest channel: many streams over one port, each with its own flow control. Pure, no I/O, no clock.

The gateway (which opens streams) and the guest agent (which accepts them) each hold one ``Multiplexer`` per port, put
received bytes into ``receive_buffer``, call ``process()``, and write what ``next_pieces()`` gives. Below it lies
``frames``; above it whatever implements ``StreamEnd``. It must never trust the peer: every rule of the protocol is
checked, what breaks one raises ProtocolViolation, and what is kept for a peer is bounded (streams by ``max_streams``,
bytes by the windows). A violation ends the epoch; the owner of the port decides what comes then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from atelier.guest_protocol import PROTOCOL_VERSION
from atelier.guest_protocol.frames import (
    CLOSE,
    CLOSE_REASON_NAMES,
    CLOSED_BUSY,
    CLOSED_RESET,
    DATA,
    EOF,
    FRAME_HEADER,
    GREETING_EPOCH,
    HEADER_BYTES,
    MAGIC,
    MAX_FRAME_BYTES,
    MAX_PAYLOAD_BYTES,
    OPEN,
    OPENED,
    TRAILER,
    TRAILER_BYTES,
    WINDOW,
    Greeting,
    LostSync,
    ProtocolViolation,
    ReceiveBuffer,
    epoch_of,
    trailer_of,
)
from atelier.guest_protocol.output_queue import OutputQueue, PackedFrame, Piece
from atelier.guest_protocol.stream import FULL_WINDOW_BYTES, INITIAL_WINDOW_BYTES, OUTPUT_HIGH_BYTES, Stream, StreamEnd

_VERSION_1_FULL_WINDOW_BYTES: Final = 1024 * 1024
WIDENED_BUDGET_BYTES: Final = 32 * 1024 * 1024
"""How much all streams of one channel together may be widened beyond their initial windows."""

_OUTPUT_LOW_BYTES: Final = MAX_FRAME_BYTES
_COPIED_BYTES: Final = 8 * 1024
"""A payload up to this size is copied in between the small frames: one more piece to write would cost more."""


class Multiplexer:
    """One end of a channel. ``on_output`` is called when there is something to write where there was nothing.

    ``accept`` (the guest's side) gets each stream that the peer opens, sets its ``end``, and answers sooner or later
    with ``accept()`` or ``close(reason)``; the host's side has none, and an OPEN from its peer is a violation.
    ``on_forgotten`` is called when unsent output has been forgotten, with what of it lies in the owner's pipe.
    ``on_greeting`` gets each greeting; it may call ``begin_epoch`` or ``end_epoch``, or raise ProtocolViolation.
    """

    def __init__(
        self,
        *,
        on_output: Callable[[], None],
        on_greeting: Callable[[Greeting], None],
        accept: Callable[[Stream], None] | None = None,
        on_forgotten: Callable[[], None] = lambda: None,
        max_streams: int = 1024,
        buffer_bytes: int = 4 * MAX_FRAME_BYTES,
    ) -> None:
        self._on_greeting = on_greeting
        self._accept = accept
        self._on_forgotten = on_forgotten
        self._max_streams = max_streams
        self.receive_buffer = ReceiveBuffer(buffer_bytes)
        self.epoch = 0
        self.skipped_bytes = 0
        """Bytes skipped outside any epoch since the last call of ``begin_epoch`` or ``end_epoch``."""
        self.skipped_only_zeros = True
        self.frames_received = 0
        self.full_window_bytes = FULL_WINDOW_BYTES
        """What a stream that is really read may be sent ahead."""
        self._trailer = TRAILER.pack(0)
        self._streams: dict[int, Stream] = {}
        self._last_identifier = 0
        self._widened_bytes = 0
        self._output = OutputQueue(on_output)
        self._waiting: deque[Stream] = deque()

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    @property
    def output_bytes(self) -> int:
        """Queued and not written yet."""
        return self._output.size

    def begin_epoch(self, nonce: bytes, version: int = PROTOCOL_VERSION) -> None:
        """Reset all streams, forget unsent output, speak ``version`` under the epoch of ``nonce`` from now on."""
        self.end_epoch()
        self.full_window_bytes = FULL_WINDOW_BYTES if version > 1 else _VERSION_1_FULL_WINDOW_BYTES
        self.epoch = epoch_of(nonce)
        self._trailer = TRAILER.pack(trailer_of(self.epoch))

    def end_epoch(self) -> None:
        """Reset all streams, forget unsent output, and skip all input up to the next greeting."""
        self.epoch = 0
        self.skipped_bytes = 0
        self.skipped_only_zeros = True
        streams, self._streams = self._streams, {}
        self._last_identifier = 0
        self._widened_bytes = 0
        self._waiting.clear()
        for stream in streams.values():
            stream.close_sent = stream.end_sent = True
            end, stream.end = stream.end, None
            if end is not None:
                end.closed(CLOSED_RESET)
        self._output.clear()
        self._on_forgotten()

    def open(self, port: int, end: StreamEnd) -> Stream | None:
        """Open a stream to the peer's ``port`` (1 to 65535); None if there are too many, or no epoch. Bytes may be
        sent at once; whether the peer takes the stream is told to ``end``."""
        if not self.epoch or len(self._streams) >= self._max_streams or self._last_identifier >= 0xFFFFFFFF:
            return None
        self._last_identifier += 1
        stream = self._streams[self._last_identifier] = Stream(self, self._last_identifier, port, opened_by_peer=False)
        stream.end = end
        self.put(OPEN, stream.identifier, port)
        return stream

    def process(self, max_frames: int = 1 << 30) -> bool:
        """Take up to ``max_frames`` frames from the receive buffer. True if it stopped for their number.

        Raises ProtocolViolation (the owner then calls ``end_epoch``), LostSync when an epoch is open and what follows
        is no frame (likewise).
        """
        buffer = self.receive_buffer
        memory, view = buffer.memory, buffer.view
        unpack, header_bytes = FRAME_HEADER.unpack_from, HEADER_BYTES
        streams = self._streams
        for _ in range(max_frames):
            start = buffer.start
            if not self.epoch:
                if not self._scan():
                    return False
                streams = self._streams
                continue
            available = buffer.end - start
            if available < header_bytes:
                return False
            epoch, kind, reason, identifier, value, magic = unpack(memory, start)
            if epoch != self.epoch or magic != MAGIC:
                if epoch != GREETING_EPOCH:
                    raise LostSync("not a frame of this epoch")
                greeting = buffer.take_greeting()
                if greeting is None:
                    return False
                self._on_greeting(greeting)
                streams = self._streams
                continue
            self.frames_received += 1
            if kind == DATA:
                if not 0 < value <= MAX_PAYLOAD_BYTES:
                    raise ProtocolViolation("DATA of a length that does not exist")
                stream = streams.get(identifier)
                if stream is None:
                    raise ProtocolViolation("a frame for an unknown stream")
                payload_start = start + header_bytes
                payload_end = payload_start + value
                if buffer.end < payload_end + TRAILER_BYTES:
                    self.frames_received -= 1
                    return False
                if not memory.startswith(self._trailer, payload_end):
                    raise LostSync("a payload without its trailer")
                buffer.start = payload_end + TRAILER_BYTES
                stream.take_data(view[payload_start:payload_end], value)
                continue
            buffer.start = start + header_bytes
            if kind == OPEN:
                self._take_open(identifier, value)
                continue
            stream = streams.get(identifier)
            if stream is None:
                raise ProtocolViolation("a frame for an unknown stream")
            if kind == WINDOW:
                stream.take_credit(value)
            elif kind == EOF:
                stream.take_end()
            elif kind == CLOSE:
                if reason >= len(CLOSE_REASON_NAMES):
                    raise ProtocolViolation("an unknown reason")
                del streams[identifier]
                stream.take_close(reason)
            elif kind == OPENED and self._accept is None:
                stream.take_opened()
            else:
                raise ProtocolViolation("an unknown kind of frame")
        return True

    def _scan(self) -> bool:
        greeting, skipped, only_zeros = self.receive_buffer.scan_for_greeting()
        self.skipped_bytes += skipped
        if not only_zeros:
            self.skipped_only_zeros = False
        if greeting is not None:
            self._on_greeting(greeting)
        return greeting is not None or skipped > 0

    def _take_open(self, identifier: int, port: int) -> None:
        if self._accept is None or identifier != self._last_identifier + 1 or not 0 < port < 65536:
            raise ProtocolViolation("an OPEN out of place")
        self._last_identifier = identifier
        stream = self._streams[identifier] = Stream(self, identifier, port, opened_by_peer=True)
        if len(self._streams) > self._max_streams:
            stream.close(CLOSED_BUSY)
        else:
            self._accept(stream)

    # Output.

    def put(self, kind: int, identifier: int, value: int = 0, reason: int = 0) -> None:
        """Queue a frame without payload."""
        if self.epoch:
            self._output.append(FRAME_HEADER.pack(self.epoch, kind, reason, identifier, value, MAGIC))

    def put_data(self, identifier: int, payload: bytes | memoryview, length: int) -> None:
        """Queue a DATA frame; a large payload itself instead of a copy, if nobody can change it any more."""
        header, trailer = self.edges_of(identifier, length)
        output = self._output
        if length <= _COPIED_BYTES or not (isinstance(payload, bytes) or payload.readonly):
            output.append(b"".join((header, payload, trailer)))
            return
        output.append(header)
        output.append_lying(payload)
        output.append(trailer)

    def borrow_frame(self) -> PackedFrame:
        return self._output.borrow_frame()

    def put_frame(self, identifier: int, frame: PackedFrame, length: int) -> None:
        """Queue a DATA frame that was filled in place."""
        self._output.append_frame(frame, (self.epoch, DATA, 0, identifier, length, MAGIC), self._trailer, length)

    def edges_of(self, identifier: int, length: int) -> tuple[bytes, bytes]:
        """Header and trailer of a DATA frame."""
        return FRAME_HEADER.pack(self.epoch, DATA, 0, identifier, length, MAGIC), self._trailer

    def put_piped(self, length: int) -> None:
        """Queue a DATA frame of so many bytes of payload that lies in the owner's pipe."""
        self._output.append_piped(HEADER_BYTES + length + TRAILER_BYTES)

    def put_raw(self, data: bytes) -> None:
        """Queue padding or a greeting."""
        self._output.append(data)

    def next_piped(self) -> int:
        """How many bytes of the owner's pipe are to be written next; 0 if it is ``next_pieces``' turn."""
        return self._output.next_piped()

    def next_pieces(self) -> list[Piece]:
        """What to write next, in order, empty if there is nothing. ``wrote`` says how much of it was written."""
        return self._output.next_pieces()

    def wrote(self, count: int) -> None:
        """``count`` bytes of what ``next_pieces`` gave have been written."""
        self._output.wrote(count)

    def offer_room(self) -> None:
        """Let streams that wait for room in the output go on, in turn. The port's owner calls it after writing."""
        if self.output_bytes > _OUTPUT_LOW_BYTES:
            return
        for _ in range(len(self._waiting)):
            if not self._waiting or self.output_bytes >= OUTPUT_HIGH_BYTES:
                return
            self._waiting.popleft().room()

    def wait_for_room(self, stream: Stream) -> None:
        if stream.start_waiting():
            self._waiting.append(stream)

    def take_widening(self) -> bool:
        if self._widened_bytes >= WIDENED_BUDGET_BYTES:
            return False
        self._widened_bytes += self.full_window_bytes - INITIAL_WINDOW_BYTES
        return True

    def give_widening_back(self) -> None:
        self._widened_bytes -= self.full_window_bytes - INITIAL_WINDOW_BYTES
