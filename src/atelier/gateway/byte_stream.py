"""A connection as previews read and write it. Base of a visitor's (``preview_server``) and a server's (``preview_upstream``).

asyncio's own streams cost more per request than all else that the gateway does with one: a task or a timer for each
limit of time, and copies between buffers. Here what came is handed on as it came, and a stream has one timer, which is set
anew only when it goes off. At most one task reads at a time, and one waits for the writing.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

PIECE_BYTES: Final = 256 * 1024
"""As much as one reading of the event loop's brings; where as much lies here unread, no more is read."""


class ByteStream(asyncio.Protocol):
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._has_ended = False
        self._error: Exception | None = None
        self._is_held = False
        self._is_full = False
        self._reading: asyncio.Future[None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    # --- what the event loop calls ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        if len(self._received) >= PIECE_BYTES and not self._is_held:
            self._is_held = True
            self.transport.pause_reading()
        _wake(self._reading)

    def eof_received(self) -> bool | None:
        """What is to be written may still be."""
        self._has_ended = True
        _wake(self._reading)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_ended = True
        self._error = exc
        self._is_full = False
        if self._timer is not None:
            self._timer.cancel()
        _wake(self._reading)
        _wake(self._writing)

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        _wake(self._writing)

    # --- what its owner calls -----------------------------------------------------------------------------------------

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    @property
    def is_usable(self) -> bool:
        """Open both ways, and nothing came that nobody has read."""
        return not (self._has_ended or self._received or self.transport.is_closing())

    async def read(self, at_most: int, seconds: float | None = None) -> bytes:
        """What there is, once there is something; empty: it has ended. ``seconds``: how long that may take.

        Raises ConnectionError, TimeoutError."""
        while not self._received:
            if self._has_ended:
                self._raise_error()
                return b""
            await self._when_more(None if seconds is None else self._loop.time() + seconds)
        return self._take(at_most)

    async def read_until(self, end: bytes, at_most: int, seconds: float | None = None) -> bytes:
        """All up to ``end``, with it; ``seconds``: how long that may take.

        Raises IncompleteReadError where the stream ends before, LimitOverrunError where it does not come within
        ``at_most`` bytes, and as ``read``."""
        deadline = None if seconds is None else self._loop.time() + seconds
        looked_at = 0
        while True:
            found = self._received.find(end, looked_at, at_most)
            if found >= 0:
                return self._take(found + len(end))
            if len(self._received) >= at_most:
                raise asyncio.LimitOverrunError("too long", len(self._received))
            if self._has_ended:
                self._raise_error()
                raise asyncio.IncompleteReadError(self._received, None)
            looked_at = max(0, len(self._received) - len(end) + 1)
            await self._when_more(deadline)

    async def write(self, piece: bytes, seconds: float | None) -> None:
        """It goes on its way; where much is under way already, when that has gone. ``seconds``: how long it may take.

        Raises ConnectionError, TimeoutError."""
        self.begin_writing(piece)
        if self._is_full:
            async with asyncio.timeout(seconds):
                await self._when_gone()
            self._check_open()

    def begin_writing(self, piece: bytes) -> None:
        """As ``write``, for a little that is gathered with what follows. Raises ConnectionError."""
        self._check_open()
        self.transport.write(piece)

    def close(self) -> None:
        """What was written still goes."""
        self.transport.close()

    def abort(self) -> None:
        """The other side sees that it was not whole."""
        self.transport.abort()

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        received = self._received
        if count >= len(received):
            taken, self._received = received, b""
        else:
            taken, self._received = received[:count], received[count:]
        if self._is_held and len(self._received) < PIECE_BYTES:
            self._is_held = False
            if not self.transport.is_closing():
                self.transport.resume_reading()
        return taken

    def _check_open(self) -> None:
        if self._error is not None or self.transport.is_closing():
            raise ConnectionResetError("the connection is closed") from self._error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise ConnectionResetError("the connection broke") from self._error

    def _when_more(self, deadline: float | None) -> asyncio.Future[None]:
        """Done when more has come or it has ended; TimeoutError at the ``deadline``, by the event loop's clock."""
        waiter = self._reading = self._loop.create_future()
        self._deadline = deadline
        if deadline is not None and (self._timer is None or self._timer_at > deadline):
            self._set_timer(deadline)
        return waiter

    def _when_gone(self) -> asyncio.Future[None]:
        """Done when what was written has gone, or nothing goes any more."""
        waiter = self._writing = self._loop.create_future()
        return waiter

    def _set_timer(self, at: float) -> None:
        """Most waits are over long before: the timer of an earlier one stays, and looks at this one's deadline."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(at, self._look_at_the_clock), at

    def _look_at_the_clock(self) -> None:
        self._timer = None
        waiter, deadline = self._reading, self._deadline
        if waiter is None or waiter.done() or deadline is None:
            return
        if self._loop.time() < deadline:
            self._set_timer(deadline)
        else:
            waiter.set_exception(TimeoutError())


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
