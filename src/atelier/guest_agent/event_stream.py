"""One reader's view of a process: the events that it has not taken yet, as envelopes of the Connect protocol.

Made by ``process`` for each Start and Connect call; filled by ``running_process``, which stops reading the program's
output while a reader is too far behind. It never ends the process.
"""

from __future__ import annotations

import asyncio
from binascii import b2a_base64
from collections.abc import Callable
from typing import Final

from atelier.guest_protocol.connect import ConnectError, encode_end_stream, encode_envelope

HIGH_BYTES: Final = 256 * 1024
"""A reader that is this far behind stops the program's output from being read."""

_PREFIXES: Final = {name: b'{"event":{"data":{"%b":"' % name.encode() for name in ("stdout", "stderr", "pty")}
KEEPALIVE: Final = encode_envelope(b'{"event":{"keepalive":{}}}')


def data_envelope(stream: str, data: bytes) -> bytes:
    """A DataEvent: ``stream`` is ``stdout``, ``stderr`` or ``pty``."""
    # Written by hand: JSON and base64 in one pass each, as much output passes here.
    text = b2a_base64(data, newline=False)
    prefix = _PREFIXES[stream]
    length = len(prefix) + len(text) + 4
    return b'\0%b%b%b"}}}' % (length.to_bytes(4, "big"), prefix, text)


class EventStream:
    """An async iterator of bytes, each one or more whole envelopes. ``on_room`` is called when a reader that was too
    far behind has caught up, ``on_close`` when nothing more will be pushed, ``on_taken`` when the last has been taken
    and sent."""

    def __init__(
        self,
        keepalive_seconds: float,
        on_room: Callable[[], None],
        on_close: Callable[[EventStream], None],
        on_taken: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pending: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._has_ended = False
        self._keepalive_seconds = keepalive_seconds
        self._keepalive: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._on_room = on_room
        self._on_close = on_close
        self._on_taken = on_taken
        self._was_silent = False
        self.pending_bytes = 0

    def push(self, envelope: bytes) -> None:
        if self._has_ended:
            return
        self._pending.append(envelope)
        self.pending_bytes += len(envelope)
        self._was_silent = False
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def end(self, error: ConnectError | None = None) -> None:
        """No more comes; what is pending is still given out."""
        if not self._has_ended:
            self.push(encode_end_stream(error))
            self._has_ended = True
            self._release()

    def set_deadline(self, seconds: float) -> None:
        """End the stream, and nothing else, with ``deadline_exceeded`` after ``seconds``."""
        self._deadline = self._loop.call_later(
            seconds, self.end, ConnectError("deadline_exceeded", f"the stream's limit of {seconds:g} s is over")
        )

    def _release(self) -> None:
        for timer in (self._keepalive, self._deadline):
            if timer is not None:
                timer.cancel()
        self._keepalive = self._deadline = None
        self._on_close(self)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        while not self._pending:
            if self._has_ended:
                self._on_taken()
                raise StopAsyncIteration
            if self._keepalive is None:
                self._keepalive = self._loop.call_later(self._keepalive_seconds, self._keep_alive)
            self._waiter = self._loop.create_future()
            await self._waiter
        pending = self._pending
        piece = pending[0] if len(pending) == 1 else b"".join(pending)
        pending.clear()
        was_full = self.pending_bytes >= HIGH_BYTES
        self.pending_bytes = 0
        if was_full:
            self._on_room()
        return piece

    async def aclose(self) -> None:
        """The reader has gone."""
        if not self._has_ended:
            self._has_ended = True
            self._pending.clear()
            was_full = self.pending_bytes >= HIGH_BYTES
            self.pending_bytes = 0
            self._release()
            if was_full:
                self._on_room()

    def _keep_alive(self) -> None:
        # The timer is not moved by each event; it looks back instead.
        if self._was_silent:
            self.push(KEEPALIVE)
        self._was_silent = True
        self._keepalive = self._loop.call_later(self._keepalive_seconds, self._keep_alive)
