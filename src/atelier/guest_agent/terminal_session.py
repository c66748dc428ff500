"""A terminal that lives on while nobody looks at it: its program, its newest output, and those who look at it.

Made by ``terminal``. No viewer ever holds the program or another viewer up, and none costs memory: each has a place in the
one ring of output, takes from there at its own pace, and is told how much it has missed when the ring has passed it by. A
viewer who begins, or goes on, in the middle does so at a line's start, with the modes that are set there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from atelier.guest_agent.event_stream import KEEPALIVE, data_envelope
from atelier.guest_agent.running_process import RunningProcess
from atelier.guest_agent.spawn import Spawned
from atelier.guest_protocol.connect import ConnectError, encode_end_stream, encode_envelope, encode_json
from atelier.guest_protocol.terminal_output import TerminalOutput, line_start, shown_command

VIEWERS_MAX: Final = 16
_PIECE_BYTES: Final = 48 * 1024
_CLOSE_SECONDS: Final = 3.0
"""How long a program may take to end after its terminal was hung up, before it is killed."""

Size = tuple[int, int]


class TerminalSession:
    """``columns`` by ``rows`` are those that all viewers can show. ``given_title``: what a person calls it; it goes before
    what its program calls it. ``ended_at`` is on the clock of ``time.monotonic``."""

    def __init__(
        self, spawned: Spawned, config: dict[str, Any], user: str, size: Size, on_end: Callable[[], None]
    ) -> None:
        self.id = os.urandom(6).hex()
        self.user = user
        self.created_at_ms = time.time_ns() // 1_000_000
        self.ended_at: float | None = None
        self.given_title = ""
        self.size = size
        self.viewers: list[TerminalViewer] = []
        self._viewers_before = 0
        program, *arguments = shown_command([config["cmd"], *(config.get("args") or [])])
        self._shown_config = {"cmd": program, "args": arguments}
        self._size_without_viewers = size
        self._output = TerminalOutput()
        self._on_end = on_end
        self.process = RunningProcess(spawned, config, None, self._ended, _ignore, self._written)

    @property
    def title(self) -> str:
        return self.given_title or self._output.title

    @property
    def end(self) -> dict[str, Any] | None:
        """The EndEvent, once its program has ended."""
        return self.process.end

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "id": self.id,
            "title": self.title,
            "config": self._shown_config,
            "user": self.user,
            "size": _size_message(self.size),
            "createdAtMs": str(self.created_at_ms),
            "viewers": len(self.viewers),
            "pid": self.process.pid,
        }
        if self.end is not None:
            described["end"] = self.end
        return described

    # What is asked of it.

    def attach(self, size: Size | None, keepalive_seconds: float) -> TerminalViewer:
        """A viewer who gets all that the ring still holds, then what follows. Raises ConnectError."""
        if len(self.viewers) >= VIEWERS_MAX:
            raise ConnectError("resource_exhausted", f"the terminal {self.id} has {VIEWERS_MAX} viewers already")
        self._viewers_before += 1
        viewer = TerminalViewer(self, self._viewers_before, size, keepalive_seconds)
        self.viewers.append(viewer)
        self._fit()
        return viewer

    def detach(self, viewer: TerminalViewer) -> None:
        if viewer in self.viewers:
            self.viewers.remove(viewer)
            self._fit()

    def resize(self, number: int, size: Size) -> None:
        """``number``: whose window has this size now; 0: nobody's, it holds while no viewer has one. Raises ConnectError."""
        if not number:
            self._size_without_viewers = size
        else:
            self._viewer(number).size = size
        self._fit()

    def _viewer(self, number: int) -> TerminalViewer:
        for viewer in self.viewers:
            if viewer.number == number:
                return viewer
        raise ConnectError("not_found", f"the terminal {self.id} has no viewer {number}")

    def rename(self, title: str) -> None:
        self.given_title = title
        self._tell()

    def hang_up(self) -> None:
        """End the program, as the closing of a window does; by force if it takes no notice."""
        with suppress(ConnectError):
            self.process.send_signal(signal.SIGHUP)
            self.process.send_signal(signal.SIGCONT)
        self.process.loop.call_later(_CLOSE_SECONDS, self._kill)

    def _kill(self) -> None:
        with suppress(ConnectError):
            self.process.send_signal(signal.SIGKILL)

    # What happens to it.

    def _fit(self) -> None:
        """The smallest of the viewers' windows: so each of them shows whole lines, and what its program has drawn."""
        sizes = [viewer.size for viewer in self.viewers if viewer.size is not None]
        if sizes:
            size = min(columns for columns, _ in sizes), min(rows for _, rows in sizes)
            self._size_without_viewers = size
        else:
            size = self._size_without_viewers
        if size != self.size:
            self.size = size
            self.process.resize(*size)
            self._tell()

    def _written(self, data: bytes) -> None:
        self._output.read(data, self.process.ring.end - len(data))
        self._tell()

    def _ended(self, process: RunningProcess) -> None:
        self.ended_at = time.monotonic()
        self._tell()
        self._on_end()

    def _tell(self) -> None:
        for viewer in self.viewers:
            viewer.wake()

    def opening(self, seen: int, position: int) -> bytes:
        return self._output.opening(seen, position)


class TerminalViewer:
    """An async iterator of envelopes: ``start``, ``replayed`` after what was there before, ``data``, ``lost``, ``title``,
    ``resize``, and ``end``. ``number`` is its name within the session; ``size`` None: it shows nothing itself."""

    def __init__(self, session: TerminalSession, number: int, size: Size | None, keepalive_seconds: float) -> None:
        self.number = number
        self.size = size
        self._session = session
        self._keepalive_seconds = keepalive_seconds
        self._position = 0
        self._replay_end = session.process.ring.end
        self._has_started = False
        self._is_replaying = True
        self._has_ended = False
        self._title = ""
        self._shown_size: Size | None = None
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> TerminalViewer:
        return self

    async def __anext__(self) -> bytes:
        if self._has_ended:
            raise StopAsyncIteration
        while not (piece := self._next()):
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(self._keepalive_seconds, self.wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
            if loop.time() >= timer.when():
                return KEEPALIVE
        return piece

    async def aclose(self) -> None:
        self._session.detach(self)

    def _next(self) -> bytes:
        """What is new to this viewer, in the order in which it matters; empty if nothing is."""
        session = self._session
        if not self._has_started:
            self._has_started = True
            self._title, self._shown_size = session.title, session.size
            return _event("start", {"terminal": session.describe(), "viewer": self.number})
        if session.size != self._shown_size:
            self._shown_size = session.size
            return _event("resize", {"size": _size_message(session.size)})
        if session.title != self._title:
            self._title = session.title
            return _event("title", {"title": session.title})
        ring = session.process.ring
        if self._position < ring.lost_bytes:
            return self._skip()
        if self._is_replaying and self._position >= self._replay_end:
            self._is_replaying = False
            return _event("replayed", {})
        if data := ring.read(self._position, _PIECE_BYTES):
            self._position += len(data)
            return data_envelope("pty", data)
        if session.end is not None:
            self._has_ended = True
            session.detach(self)
            return _event("end", session.end) + encode_end_stream()
        return b""

    def _skip(self) -> bytes:
        """Over what the ring holds no more, to the next start of a line."""
        ring = self._session.process.ring
        start = ring.lost_bytes
        start += line_start(ring.read(start, _PIECE_BYTES))
        seen, self._position = self._position, start
        opening = self._session.opening(seen, start)
        return _event("lost", {"bytes": str(start - seen)}) + data_envelope("pty", opening)


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return encode_envelope(encode_json({"event": {name: fields}}))


def _size_message(size: Size) -> dict[str, int]:
    return {"cols": size[0], "rows": size[1]}


def _ignore(_: RunningProcess) -> None:
    pass
