"""Takes the body of a request straight from where the connection's bytes arrive, without a copy in between.

In a guest under software emulation a copy costs half as much as the write to the disk does, and an ordinary
``StreamReader`` makes two. Used by ``http`` for uploads; connections whose reader is a ``DirectReader`` get it, others
are read the ordinary way. Knows no files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from atelier.guest_agent.gate import Gate
from atelier.guest_protocol.connect import ConnectError

_LINE_MAX_BYTES: Final = 256
_TRAILERS_MAX: Final = 100

Take = Callable[[memoryview], None]
"""Gets the pieces of a body. A piece is only valid until it returns."""

_SIZE: Final = 0
_CONTENT_END: Final = 1
_TRAILER: Final = 2


class BodyIntake:
    """Cuts one body out of a stream of bytes and hands its content to ``take``. ``length`` -1: it comes in chunks."""

    __slots__ = ("_left", "_line", "_state", "_take", "_trailers", "is_chunked", "is_complete")

    def __init__(self, take: Take, length: int) -> None:
        self._take = take
        self.is_chunked = length < 0
        self.is_complete = length == 0
        self._left = max(length, 0)
        self._line = bytearray()
        self._state = _SIZE
        self._trailers = 0

    @property
    def left_bytes(self) -> int:
        """How much of the body, or of its present chunk, is still to come."""
        return self._left

    def feed(self, data: memoryview) -> int:
        """Take what belongs to the body; returns how many bytes that were. Raises ConnectError for broken framing, and
        whatever ``take`` raises."""
        used, size = 0, len(data)
        while used < size and not self.is_complete:
            if self._left:
                end = min(size, used + self._left)
                self._left -= end - used
                piece = data[used:end]
                used = end
                self._take(piece)
                if not self._left and not self.is_chunked:
                    self.is_complete = True
            else:
                used += self._feed_line(data[used : used + _LINE_MAX_BYTES].tobytes())
        return used

    def _feed_line(self, head: bytes) -> int:
        end = head.find(b"\n")
        if end < 0:
            self._line += head
            if len(self._line) >= _LINE_MAX_BYTES:
                raise ConnectError("invalid_argument", f"a line in the body is longer than {_LINE_MAX_BYTES} bytes")
            return len(head)
        line = (bytes(self._line) + head[:end]).removesuffix(b"\r")
        self._line.clear()
        if self._state == _SIZE:
            self._take_size(line)
        elif self._state == _CONTENT_END:
            if line:
                raise ConnectError("invalid_argument", "a chunk is longer than its size says")
            self._state = _SIZE
        else:
            self._trailers += 1
            if self._trailers > _TRAILERS_MAX:
                raise ConnectError("invalid_argument", "too many trailers")
            self.is_complete = not line
        return end + 1

    def _take_size(self, line: bytes) -> None:
        digits = line.partition(b";")[0].strip()
        if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
            raise ConnectError("invalid_argument", "a chunk's size is no hexadecimal number")
        self._left = int(digits, 16)
        self._state = _CONTENT_END if self._left else _TRAILER


class DirectReader(asyncio.StreamReader):
    """A StreamReader from which a body can be poured."""

    if TYPE_CHECKING:
        # Attributes of CPython's StreamReader that its type stubs leave out.
        _buffer: bytearray

        def _maybe_resume_transport(self) -> None: ...

    _intake: BodyIntake | None = None
    _poured: asyncio.Future[None] | None = None

    async def pour(self, intake: BodyIntake, gate: Gate | None = None) -> None:
        """Return when ``intake`` has its whole body; while ``gate`` is closed it gets nothing. Raises
        ConnectionResetError when the connection ends before, and what ``intake`` raises; the connection is then good
        for nothing more."""
        while True:
            if gate is not None:
                await gate.opened()
            if self._buffer and not intake.is_complete:
                with memoryview(self._buffer) as view:
                    used = intake.feed(view)
                del self._buffer[:used]
                self._maybe_resume_transport()
            if intake.is_complete:
                return
            if self.at_eof():
                raise ConnectionResetError("the client went away inside a request's body")
            error = self.exception()
            if error is not None:
                raise error
            await self._pour_on(intake, gate)

    async def _pour_on(self, intake: BodyIntake, gate: Gate | None) -> None:
        """Let ``intake`` have what arrives, until it is complete or the gate closes."""
        self._intake = intake
        self._poured = asyncio.get_running_loop().create_future()
        if gate is not None:
            gate.on_close.add(self._pause)
        try:
            await self._poured
        finally:
            if gate is not None:
                gate.on_close.discard(self._pause)
            self._intake = self._poured = None

    def _pause(self) -> None:
        self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        self._intake = None
        if self._poured is not None and not self._poured.done():
            if error is None:
                self._poured.set_result(None)
            else:
                self._poured.set_exception(error)

    def feed_data(self, data: bytes | bytearray | memoryview) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - takes more than the stubs promise
        intake = self._intake
        if intake is None:
            super().feed_data(data)  # pyright: ignore[reportArgumentType]
            return
        view = memoryview(data)
        try:
            used = intake.feed(view)
        except Exception as error:  # it belongs to the task that waits for the body
            self._finish(error)
            return
        if intake.is_complete:
            self._finish(None)
            if used < len(view):
                super().feed_data(view[used:])  # pyright: ignore[reportArgumentType]

    def feed_eof(self) -> None:
        if self._intake is not None:
            self._finish(ConnectionResetError("the client went away inside a request's body"))
        super().feed_eof()

    def set_exception(self, exc: Exception) -> None:
        if self._intake is not None:
            self._finish(exc)
        super().set_exception(exc)
