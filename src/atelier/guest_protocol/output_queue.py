"""What one end of a guest channel has still to write: small frames gathered, large ones from where they lie.

Owned by ``multiplexer``. In a guest under software emulation each piece that is written is an exchange with the VMM and
costs as much as many kilobytes do. So small frames are joined, and bulk data goes out in ``PackedFrame``s: frames whose
header, payload and trailer lie in one piece of memory, read into and written from without a copy, and cut just as the
port takes it. Knows no streams and does no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from atelier.guest_protocol.frames import (
    FRAME_HEADER,
    HEADER_BYTES,
    PACKED_FRAME_BYTES,
    PACKED_PAYLOAD_BYTES,
    PORT_WRITE_BYTES,
    TRAILER_BYTES,
)

_GATHER_BYTES: Final = 32 * 1024
_PIECES_BYTES: Final = 256 * 1024
_PIECES: Final = 16

Piece = bytes | bytearray | memoryview


class PipedBytes(int):
    """A frame that lies in the owner's pipe: so many bytes, which come out of it next."""

    __slots__ = ()

    def __len__(self) -> int:
        return self


class PackedFrame:
    """Memory for one DATA frame. Who borrows it fills ``payload`` from its start and sends it."""

    __slots__ = ("_memory", "_pieces", "_view", "payload")

    def __init__(self) -> None:
        self._memory = bytearray(PACKED_FRAME_BYTES)
        self._view = memoryview(self._memory)
        self.payload = self._view[HEADER_BYTES : HEADER_BYTES + PACKED_PAYLOAD_BYTES]
        self._pieces = self._cut(PACKED_FRAME_BYTES)

    def _cut(self, size: int) -> list[memoryview]:
        return [self._view[at : min(at + PORT_WRITE_BYTES, size)] for at in range(0, size, PORT_WRITE_BYTES)]

    def seal(self, header: tuple[int, int, int, int, int, int], trailer: bytes, length: int) -> list[memoryview]:
        """Put header and trailer around ``length`` bytes of payload; the whole frame in pieces that the port takes."""
        FRAME_HEADER.pack_into(self._memory, 0, *header)
        end = HEADER_BYTES + length
        self._memory[end : end + TRAILER_BYTES] = trailer
        return self._pieces if length == PACKED_PAYLOAD_BYTES else self._cut(end + TRAILER_BYTES)


class OutputQueue:
    """``on_output`` is called when there is something to write where there was nothing."""

    def __init__(self, on_output: Callable[[], None]) -> None:
        self._on_output = on_output
        self.size = 0
        """Bytes queued and not written."""
        self._pieces: deque[Piece | PipedBytes] = deque()
        self._written_bytes = 0
        """How much of the first piece has been written."""
        self._gathering: bytearray | None = None
        """The last piece, while small frames may still be added to it."""
        self._queued_total = 0
        self._lent: deque[tuple[int, PackedFrame]] = deque()
        """The packed frames in the queue, with the value of ``_queued_total`` behind each."""
        self._free: list[PackedFrame] = []

    def clear(self) -> None:
        self._pieces.clear()
        self._written_bytes = self.size = 0
        self._gathering = None
        self._free += (frame for _, frame in self._lent)
        self._lent.clear()

    def append(self, data: bytes) -> None:
        """Queue a small piece, joined with those before it, or a large one as it is."""
        gathering = self._gathering
        if gathering is not None and len(gathering) + len(data) <= _GATHER_BYTES:
            gathering += data
        elif len(data) <= _GATHER_BYTES:
            self._gathering = bytearray(data)
            self._pieces.append(self._gathering)
        else:
            self._gathering = None
            self._pieces.append(data)
        self._grown(len(data))

    def append_lying(self, payload: bytes | memoryview) -> None:
        """Queue a piece that is written from where it lies; nobody may change it any more."""
        self._gathering = None
        self._pieces.append(payload)
        self._grown(len(payload))

    def append_piped(self, length: int) -> None:
        """Queue a frame that has just been put into the owner's pipe."""
        self._gathering = None
        self._pieces.append(PipedBytes(length))
        self._grown(length)

    def borrow_frame(self) -> PackedFrame:
        """Who does not send it after all just drops it."""
        return self._free.pop() if self._free else PackedFrame()

    def append_frame(
        self, frame: PackedFrame, header: tuple[int, int, int, int, int, int], trailer: bytes, length: int
    ) -> None:
        """Queue a borrowed frame. Its memory is the queue's again, to be lent anew once it is written."""
        self._gathering = None
        self._pieces += frame.seal(header, trailer, length)
        size = HEADER_BYTES + length + TRAILER_BYTES
        self._lent.append((self._queued_total + size, frame))
        self._grown(size)

    def _grown(self, count: int) -> None:
        was_empty = self.size == 0
        self.size += count
        self._queued_total += count
        if was_empty:
            self._on_output()

    def next_piped(self) -> int:
        """How many bytes of the pipe are to be written next; 0 if it is ``next_pieces``' turn. ``wrote`` says how many
        were."""
        if not self._pieces or not isinstance(first := self._pieces[0], PipedBytes):
            return 0
        return first - self._written_bytes

    def next_pieces(self) -> list[Piece]:
        """What to write next, in order, empty if there is nothing. ``wrote`` says how much of it was written."""
        # What has been handed out is not added to: its memory is lent.
        self._gathering = None
        pieces: list[Piece] = []
        size = 0
        for piece in self._pieces:
            if isinstance(piece, PipedBytes):
                break
            pieces.append(piece)
            size += len(piece)
            if size >= _PIECES_BYTES or len(pieces) >= _PIECES:
                break
        if self._written_bytes and pieces:
            pieces[0] = memoryview(pieces[0])[self._written_bytes :]
        return pieces

    def wrote(self, count: int) -> None:
        """``count`` bytes of what ``next_pieces`` gave have been written."""
        if count > self.size:
            raise ValueError("more written than was given")
        self.size -= count
        pieces = self._pieces
        count += self._written_bytes
        while pieces and count >= len(pieces[0]):
            count -= len(pieces.popleft())
        self._written_bytes = count
        if self._lent:
            written_total = self._queued_total - self.size
            while self._lent and self._lent[0][0] <= written_total:
                self._free.append(self._lent.popleft()[1])
