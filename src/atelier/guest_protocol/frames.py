"""The bytes of the guest channel: frame layout, greetings, and a receive buffer that finds them. Pure, no I/O.

Used by ``multiplexer``, and by the two ends (the gateway and the guest agent) for the greeting of an epoch.

A frame is 16 bytes ``epoch u32 | type u8 | reason u8 | stream u32 | value u32 | magic u16``, big-endian. Only DATA
and the greetings have a payload, of ``value`` bytes; for the others ``value`` is the port (OPEN) or the credit
(WINDOW). A DATA payload is followed by 4 bytes that come from the epoch. The port knows no sessions: whoever writes
may die inside a frame, and the next writer's bytes follow. Therefore a new writer first sends a whole frame's length of
zeros: a half header lacks its magic, a half payload its trailer, and neither is ever taken for a frame. There is no
checksum over payloads: the port is memory, not a wire.

A greeting opens an epoch. It can be found in the middle of garbage by its mark, and carries a CRC:
HELLO (host: nonce, token), HELLO_ACK (guest: the same nonce), KNOCK (guest, which has lost the stream: send me a
HELLO that echoes my nonce).
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

FRAME_HEADER: Final = struct.Struct(">IBBIIH")
HEADER_BYTES: Final = 16
TRAILER: Final = struct.Struct(">I")
TRAILER_BYTES: Final = 4
MAGIC: Final = 0xA7E1

MAX_PAYLOAD_BYTES: Final = 128 * 1024
"""Large, since an emulated guest pays for each frame; small enough that other streams wait a few ms at most. A whole
number of ``PORT_WRITE_BYTES``."""
MAX_FRAME_BYTES: Final = MAX_PAYLOAD_BYTES + HEADER_BYTES + TRAILER_BYTES
PADDING: Final = bytes(MAX_FRAME_BYTES)

PORT_WRITE_BYTES: Final = 32 * 1024
"""The most that one write to a Linux virtio port takes."""
PACKED_FRAME_BYTES: Final = 4 * PORT_WRITE_BYTES
PACKED_PAYLOAD_BYTES: Final = PACKED_FRAME_BYTES - HEADER_BYTES - TRAILER_BYTES
"""Of a frame whose whole length, not that of its payload, is a number of full writes."""

HELLO: Final = 1
HELLO_ACK: Final = 2
KNOCK: Final = 3
OPEN: Final = 4
OPENED: Final = 5
DATA: Final = 6
EOF: Final = 7
WINDOW: Final = 8
CLOSE: Final = 9

CLOSED_DONE: Final = 0
"""As after close(2): nothing more comes, nothing more is read; what was sent before still counts."""
CLOSED_REFUSED: Final = 1
CLOSED_UNREACHABLE: Final = 2
CLOSED_RESET: Final = 3
CLOSED_BUSY: Final = 4
CLOSE_REASON_NAMES: Final = ("done", "refused", "unreachable", "reset", "busy")

GREETING_EPOCH: Final = 0xFFFFFFFF
NONCE_BYTES: Final = 16
NO_NONCE: Final = bytes(NONCE_BYTES)
TOKEN_MAX_BYTES: Final = 1024

_GREETING_MARK: Final = b"\xa7atelier-epoch\xe1\x0a"
_GREETING_FIELDS: Final = struct.Struct(">16sH16s16sH")
_CRC: Final = struct.Struct(">I")
_GREETING_MIN_BYTES: Final = _GREETING_FIELDS.size + _CRC.size
GREETING_MAX_BYTES: Final = _GREETING_MIN_BYTES + TOKEN_MAX_BYTES


class ProtocolViolation(Exception):
    """The peer sent what no correct peer sends. The message names the rule, never the peer's bytes."""


class LostSync(Exception):
    """The bytes at hand are no frame: the peer died inside one, or garbage follows. Only a greeting helps."""


class Greeting(NamedTuple):
    """``echo`` is the nonce of the KNOCK that a HELLO answers, else zeros. ``version`` is the protocol that the sender
    proposes (HELLO), has chosen (HELLO_ACK) or speaks (KNOCK)."""

    kind: int
    version: int
    nonce: bytes
    echo: bytes = NO_NONCE
    token: str = ""


def encode_greeting(greeting: Greeting) -> bytes:
    token = greeting.token.encode()
    if len(token) > TOKEN_MAX_BYTES or len(greeting.nonce) != NONCE_BYTES or len(greeting.echo) != NONCE_BYTES:
        raise ValueError("a greeting has nonces of 16 bytes and a token of at most 1024")
    fields = _GREETING_FIELDS.pack(_GREETING_MARK, greeting.version, greeting.nonce, greeting.echo, len(token)) + token
    length = len(fields) + _CRC.size
    header = FRAME_HEADER.pack(GREETING_EPOCH, greeting.kind, 0, 0, length, MAGIC)
    return header + fields + _CRC.pack(zlib.crc32(fields))


def _decode_greeting(kind: int, payload: bytes) -> Greeting | None:
    fields = payload[: -_CRC.size]
    if _CRC.unpack_from(payload, len(fields))[0] != zlib.crc32(fields):
        return None
    mark, version, nonce, echo, token_length = _GREETING_FIELDS.unpack_from(fields)
    token = fields[_GREETING_FIELDS.size :]
    if mark != _GREETING_MARK or token_length != len(token):
        return None
    return Greeting(kind, version, nonce, echo, token.decode(errors="replace"))


def epoch_of(nonce: bytes) -> int:
    """The number that all frames of an epoch carry: neither 0 nor GREETING_EPOCH, and its trailer is not 0."""
    return (int.from_bytes(nonce[:4], "big") & 0x7FFFFFFF) | 1


def trailer_of(epoch: int) -> int:
    return epoch ^ 0xFFFFFFFF


class ReceiveBuffer:
    """A fixed piece of memory that received bytes go into and frames are taken from.

    ``space()`` gives the free part to receive into, ``received(n)`` says how much came; ``start`` and ``end`` bound
    the bytes not yet taken. It never grows, and always has room for the rest of any frame.
    """

    __slots__ = ("end", "memory", "start", "view")

    def __init__(self, capacity_bytes: int = 4 * MAX_FRAME_BYTES) -> None:
        if capacity_bytes < 2 * MAX_FRAME_BYTES:
            raise ValueError("the buffer must hold two frames")
        self.memory = bytearray(capacity_bytes)
        self.view = memoryview(self.memory)
        self.start = 0
        self.end = 0

    def space(self) -> memoryview:
        """The free memory, at least MAX_FRAME_BYTES of it as long as less than a whole frame is kept."""
        if self.start == self.end:
            self.start = self.end = 0
        elif len(self.memory) - self.end < MAX_FRAME_BYTES and self.start:
            kept = self.end - self.start
            self.memory[:kept] = self.memory[self.start : self.end]
            self.start, self.end = 0, kept
        return self.view[self.end :]

    def received(self, count: int) -> None:
        self.end += count

    def clear(self) -> None:
        self.start = self.end = 0

    def take_greeting(self) -> Greeting | None:
        """Take the greeting that starts right here; None if more bytes are needed. Raises LostSync if there is none."""
        available = self.end - self.start
        if available < HEADER_BYTES:
            return None
        epoch, kind, _reason, _stream, length, magic = FRAME_HEADER.unpack_from(self.memory, self.start)
        if (
            magic != MAGIC
            or epoch != GREETING_EPOCH
            or not HELLO <= kind <= KNOCK
            or not _GREETING_MIN_BYTES <= length <= GREETING_MAX_BYTES
        ):
            raise LostSync("no greeting here")
        if available < HEADER_BYTES + length:
            return None
        body = self.start + HEADER_BYTES
        greeting = _decode_greeting(kind, bytes(self.view[body : body + length]))
        if greeting is None:
            raise LostSync("a damaged greeting")
        self.start = body + length
        return greeting

    def scan_for_greeting(self) -> tuple[Greeting | None, int, bool]:
        """Skip everything up to the next greeting and take it.

        Returns (the greeting, or None if more bytes are needed; how many bytes were skipped; whether all of those
        were zeros). May return None with bytes left to look at: call again if it skipped anything.
        """
        begin = self.start
        mark = self.memory.find(_GREETING_MARK, begin, self.end)
        if mark < 0:
            # The mark may have come in part; its header stands before it.
            upto = max(begin, self.end - (HEADER_BYTES + len(_GREETING_MARK) - 1))
            greeting = None
        else:
            upto = max(begin, mark - HEADER_BYTES)
            self.start = upto
            try:
                if mark - begin < HEADER_BYTES:
                    raise LostSync("a mark without a header")
                greeting = self.take_greeting()
            except LostSync:
                greeting = None
                upto = mark + 1
        skipped = upto - begin
        clean = self.memory.count(0, begin, upto) == skipped
        if greeting is None:
            self.start = upto
        return greeting, skipped, clean
