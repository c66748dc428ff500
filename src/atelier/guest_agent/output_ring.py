"""The newest output of one process, bounded: what a reader who comes later still gets. Pure, no I/O.

Filled and replayed by ``running_process``; a terminal's viewers read it from where each of them is. Bytes that were pushed out are counted, never silently gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

RING_BYTES: Final = 1024 * 1024
_MAX_PIECES: Final = 4096
_JOIN_BYTES: Final = 8 * 1024


class OutputRing:
    """Pieces of output in their order, each with its stream's name; the oldest make room for the newest."""

    __slots__ = ("_held_bytes", "_limit_bytes", "_pieces", "lost_bytes")

    def __init__(self, limit_bytes: int = RING_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: deque[tuple[str, bytes | bytearray]] = deque()
        self._held_bytes = 0
        self.lost_bytes = 0
        """How many bytes were pushed out since the process started."""

    def __len__(self) -> int:
        return self._held_bytes

    def append(self, stream: str, data: bytes) -> None:
        pieces = self._pieces
        self._held_bytes += len(data)
        # A program that writes single bytes must not cost an object for each.
        if len(data) < _JOIN_BYTES and pieces:
            last_stream, last = pieces[-1]
            if last_stream == stream and len(last) < _JOIN_BYTES:
                if isinstance(last, bytearray):
                    last += data
                else:
                    pieces[-1] = (stream, bytearray(last) + data)
                self._trim()
                return
        pieces.append((stream, data))
        self._trim()

    def _trim(self) -> None:
        pieces = self._pieces
        while self._held_bytes > self._limit_bytes or len(pieces) > _MAX_PIECES:
            stream, oldest = pieces[0]
            excess = self._held_bytes - self._limit_bytes
            if len(pieces) <= _MAX_PIECES and 0 < excess < len(oldest):
                pieces[0] = (stream, oldest[excess:])
                self._held_bytes -= excess
                self.lost_bytes += excess
                return
            pieces.popleft()
            self._held_bytes -= len(oldest)
            self.lost_bytes += len(oldest)

    @property
    def end(self) -> int:
        """How many bytes were written since the process started."""
        return self.lost_bytes + self._held_bytes

    def read(self, position: int, limit_bytes: int) -> bytes:
        """What was written from ``position`` (``lost_bytes`` or later) on, of all streams, at most ``limit_bytes``."""
        first, start = len(self._pieces), self.end
        while start > position:
            first -= 1
            start -= len(self._pieces[first][1])
        taken: list[bytes | bytearray] = []
        wanted = position - start + limit_bytes
        while wanted > 0 and first < len(self._pieces):
            piece = self._pieces[first][1]
            taken.append(piece)
            wanted -= len(piece)
            first += 1
        return b"".join(taken)[position - start : position - start + limit_bytes]

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for stream, data in self._pieces:
            yield stream, bytes(data)
