"""One stream of a guest channel, as its two neighbours see it: the ``Multiplexer`` below, a ``StreamEnd`` above.

Flow control: each side may send INITIAL_WINDOW_BYTES per stream unasked; the receiver returns credit with WINDOW as
its own reader takes the bytes, and once, for a stream that is really read, widens the window. A stream ends when
both sides have sent CLOSE; until then its number stays known, so a frame for an unknown number is a violation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from atelier.guest_protocol.frames import (
    CLOSE,
    CLOSED_DONE,
    EOF,
    MAX_FRAME_BYTES,
    MAX_PAYLOAD_BYTES,
    OPENED,
    PACKED_PAYLOAD_BYTES,
    WINDOW,
    ProtocolViolation,
)
from atelier.guest_protocol.output_queue import PackedFrame

if TYPE_CHECKING:
    from atelier.guest_protocol.multiplexer import Multiplexer

INITIAL_WINDOW_BYTES: Final = 256 * 1024
FULL_WINDOW_BYTES: Final = 2 * 1024 * 1024
"""Large, since each WINDOW frame that reaches an emulated guest costs it as much as copying some 50 KiB does; not larger,
since that is what the gateway holds for a client that stops reading."""
MIN_CREDIT_BYTES: Final = 16 * 1024
"""A WINDOW frame gives at least this much, so that a flood of them is a violation."""
OUTPUT_HIGH_BYTES: Final = 2 * MAX_FRAME_BYTES
"""Streams send nothing more while so much waits to be written."""


class StreamEnd(Protocol):
    """What sits on a stream on this side. Called by the multiplexer; must not block, must not raise."""

    def opened(self) -> None:
        """The peer accepted the stream (only where it was opened from here)."""
        ...

    def received(self, payload: memoryview) -> None:
        """Bytes, valid during this call only. ``Stream.consumed`` is due once they have been passed on."""
        ...

    def received_end(self) -> None:
        """Nothing more will come; sending still works."""
        ...

    def closed(self, reason: int) -> None:
        """The last call: the peer closed the stream (CLOSED_DONE: what came before is to be passed on still)
        or the epoch is over (CLOSED_RESET)."""
        ...

    def may_send(self) -> None:
        """``sendable_bytes`` has answered 0, or ``borrow_frame`` None, and is worth asking again."""
        ...


class Stream:
    """One stream, as its StreamEnd sees it. All methods do nothing once it is closed."""

    __slots__ = (
        "_multiplexer",
        "_receive_credit",
        "_send_credit",
        "_starved",
        "_unreturned",
        "_waiting",
        "_wide",
        "close_sent",
        "end",
        "end_received",
        "end_sent",
        "identifier",
        "opened",
        "peer_may_speak",
        "port",
    )

    def __init__(self, multiplexer: Multiplexer, identifier: int, port: int, *, opened_by_peer: bool) -> None:
        self._multiplexer = multiplexer
        self.identifier = identifier
        self.port = port
        self.end: StreamEnd | None = None
        self.opened = False
        self.peer_may_speak = opened_by_peer
        """The side that opens a stream may send at once, the other one after its OPENED."""
        self.end_sent = False
        self.end_received = False
        self.close_sent = False
        self._send_credit = INITIAL_WINDOW_BYTES
        self._receive_credit = INITIAL_WINDOW_BYTES
        self._unreturned = 0
        self._wide = False
        self._waiting = False
        self._starved = False

    def sendable_bytes(self) -> int:
        """How much ``send`` takes now, at most one frame's payload. After 0, ``may_send`` will be called."""
        if self.end_sent or self.close_sent:
            return 0
        if self._multiplexer.output_bytes >= OUTPUT_HIGH_BYTES:
            self._multiplexer.wait_for_room(self)
            return 0
        if self._send_credit == 0:
            self._starved = True
        return min(self._send_credit, MAX_PAYLOAD_BYTES)

    def send(self, payload: bytes | memoryview) -> None:
        """Send 1 to ``sendable_bytes()`` bytes. A large payload that cannot change is not copied."""
        length = len(payload)
        if self.end_sent or self.close_sent:
            return
        if not 0 < length <= min(self._send_credit, MAX_PAYLOAD_BYTES):
            raise ValueError("more than the stream may send now")
        self._send_credit -= length
        self._multiplexer.put_data(self.identifier, payload, length)

    def takes_frame(self, length: int) -> bool:
        """Whether so many bytes can go now in one frame. If not, ``may_send`` will be called."""
        if self.end_sent or self.close_sent:
            return False
        if self._multiplexer.output_bytes >= OUTPUT_HIGH_BYTES:
            self._multiplexer.wait_for_room(self)
            return False
        if self._send_credit < length:
            self._starved = True
            return False
        return True

    def borrow_frame(self, wanted: int) -> PackedFrame | None:
        """A frame to fill with up to ``wanted`` bytes and to give to ``send_frame`` before anything else is sent: the
        way of bulk data. None if not all of them, or a full frame, can go now; then ``may_send`` will be called."""
        return self._multiplexer.borrow_frame() if self.takes_frame(min(wanted, PACKED_PAYLOAD_BYTES)) else None

    def edges_of(self, length: int) -> tuple[bytes, bytes]:
        """Header and trailer for ``send_piped``."""
        return self._multiplexer.edges_of(self.identifier, length)

    def send_piped(self, length: int) -> None:
        """Send a frame with so many bytes of payload that the caller has just put, with its edges, into the pipe of
        whoever owns the port: the way of files' bytes."""
        if not 0 < length <= min(self._send_credit, MAX_PAYLOAD_BYTES) or self.end_sent or self.close_sent:
            raise ValueError("more than the stream may send now")
        self._send_credit -= length
        self._multiplexer.put_piped(length)

    def send_frame(self, frame: PackedFrame, length: int) -> None:
        """Send the first ``length`` bytes of a borrowed frame's payload."""
        if self.end_sent or self.close_sent:
            return
        if not 0 < length <= min(self._send_credit, PACKED_PAYLOAD_BYTES):
            raise ValueError("more than the stream may send now")
        self._send_credit -= length
        self._multiplexer.put_frame(self.identifier, frame, length)

    def send_end(self) -> None:
        """No more bytes from here. If the peer has said so too, this closes the stream."""
        if self.end_sent or self.close_sent:
            return
        self.end_sent = True
        if self.end_received:
            self._send_close(CLOSED_DONE)
        else:
            self._multiplexer.put(EOF, self.identifier)

    def close(self, reason: int = CLOSED_DONE) -> None:
        """Neither send nor read any more. No call to ``end`` follows."""
        self.end = None
        self._send_close(reason)

    def accept(self) -> None:
        """Answer an OPEN of the peer's with yes."""
        if not self.opened and not self.close_sent:
            self.opened = True
            self._multiplexer.put(OPENED, self.identifier)

    def consumed(self, count: int) -> None:
        """``count`` received bytes have been passed on: give their credit back, in steps that leave the sender at
        least half a window to go on with. Each WINDOW frame costs an emulated guest an interrupt and a turn."""
        if self.end_received or self.close_sent:
            return
        self._unreturned += count
        if self._unreturned < (self._multiplexer.full_window_bytes // 2 if self._wide else INITIAL_WINDOW_BYTES // 4):
            return
        credit = self._unreturned
        self._unreturned = 0
        if not self._wide and self._multiplexer.take_widening():
            # Only a stream that is read gets here: one whose reader stalls keeps the small window.
            self._wide = True
            credit += self._multiplexer.full_window_bytes - INITIAL_WINDOW_BYTES
        self._receive_credit += credit
        self._multiplexer.put(WINDOW, self.identifier, credit)

    def _send_close(self, reason: int) -> None:
        if not self.close_sent:
            self.close_sent = True
            self.end_sent = True
            self._multiplexer.put(CLOSE, self.identifier, 0, reason)

    # What follows is called by the multiplexer alone.

    def take_data(self, payload: memoryview, length: int) -> None:
        if not self.peer_may_speak:
            raise ProtocolViolation("DATA before the stream was opened")
        if self.end_received:
            raise ProtocolViolation("DATA after the end of the stream")
        if length > self._receive_credit:
            raise ProtocolViolation("DATA beyond the window")
        self._receive_credit -= length
        if self.end is not None:
            self.end.received(payload)

    def take_end(self) -> None:
        if not self.peer_may_speak or self.end_received:
            raise ProtocolViolation("EOF out of place")
        self.end_received = True
        if self.end_sent:
            self._send_close(CLOSED_DONE)
        if self.end is not None:
            self.end.received_end()

    def take_credit(self, credit: int) -> None:
        allowed = self._multiplexer.full_window_bytes - self._send_credit
        if not self.peer_may_speak or not MIN_CREDIT_BYTES <= credit <= allowed:
            raise ProtocolViolation("a WINDOW out of bounds")
        self._send_credit += credit
        if self._starved:
            self._starved = False
            if self.end is not None:
                self.end.may_send()

    def take_opened(self) -> None:
        if self.opened:
            raise ProtocolViolation("OPENED twice")
        self.opened = self.peer_may_speak = True
        if self.end is not None:
            self.end.opened()

    def take_close(self, reason: int) -> None:
        self._send_close(CLOSED_DONE)
        self.end_received = True
        if self._wide:
            self._multiplexer.give_widening_back()
        end, self.end = self.end, None
        if end is not None:
            end.closed(reason)

    def room(self) -> None:
        self._waiting = False
        if self.end is not None:
            self.end.may_send()

    def start_waiting(self) -> bool:
        """True if the stream was not waiting for room yet."""
        was_waiting, self._waiting = self._waiting, True
        return not was_waiting
