"""Terminals of fake guests, with the contract of the real ones. Part of ``fake``."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from atelier.drivers.guest.fake_processes import FakeProcess
from atelier.guest_protocol.terminal_output import TerminalOutput, clean_title, shown_command
from atelier.model.errors import GuestError, GuestUnreachableError, NotFoundError
from atelier.model.guest import ProcessEnded, ProcessOutput, ProcessSpec, TerminalSize
from atelier.model.terminal import (
    TerminalEvent,
    TerminalJoined,
    TerminalLost,
    TerminalReplayed,
    TerminalResized,
    TerminalSession,
    TerminalTitled,
)

_SESSIONS_MAX = 32
_VIEWERS_MAX = 16
_VIEWER_BYTES = 1024 * 1024


class _Viewer:
    """Who looks at a terminal. Of what it does not take, the oldest is dropped."""

    def __init__(self, number: int, size: TerminalSize | None) -> None:
        self.number = number
        self.size = size
        self._events: deque[TerminalEvent] = deque()
        self._pending_bytes = 0
        self._lost_bytes = 0
        self._is_cut = False
        self._arrived = asyncio.Event()

    def push(self, event: TerminalEvent) -> None:
        if isinstance(event, ProcessOutput) and (excess := len(event.data) - _VIEWER_BYTES) > 0:
            self._lost_bytes += excess
            event = ProcessOutput(event.stream, event.data[excess:])
        self._events.append(event)
        if isinstance(event, ProcessOutput):
            self._pending_bytes += len(event.data)
        while self._pending_bytes > _VIEWER_BYTES:
            oldest = self._events.popleft()
            if isinstance(oldest, ProcessOutput):
                self._pending_bytes -= len(oldest.data)
                self._lost_bytes += len(oldest.data)
        self._arrived.set()

    def cut(self) -> None:
        self._is_cut = True
        self._arrived.set()

    async def follow(self) -> AsyncIterator[TerminalEvent]:
        while True:
            if self._is_cut:
                raise GuestUnreachableError("the fake guest broke the connection off")
            while self._events:
                if self._lost_bytes:
                    lost, self._lost_bytes = self._lost_bytes, 0
                    yield TerminalLost(lost)
                event = self._events.popleft()
                if isinstance(event, ProcessOutput):
                    self._pending_bytes -= len(event.data)
                yield event
                if isinstance(event, ProcessEnded):
                    return
            self._arrived.clear()
            await self._arrived.wait()


class FakeTerminal:
    """One terminal, and the process in it. ``memory``: what ``dump`` gave."""

    def __init__(self, id: str, process: FakeProcess, memory: dict[str, Any] | None = None) -> None:
        self.id = id
        self.process = process
        self.given_title = ""
        self._created_at = datetime.now(UTC)
        self._size = process.terminal_size or TerminalSize(80, 24)
        self._written_bytes = len(process.kept_output)
        self._output = TerminalOutput()
        self._numbers = itertools.count(1)
        self._viewers: list[_Viewer] = []
        if memory is not None:
            self.given_title, self._output.title = memory["given_title"], memory["title"]
            self._created_at = datetime.fromisoformat(memory["created_at"])
        process.watcher = self

    def dump(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "pid": self.process.pid,
            "given_title": self.given_title,
            "title": self._output.title,
            "created_at": self._created_at.isoformat(),
        }

    @property
    def _title(self) -> str:
        return self.given_title or self._output.title

    def describe(self) -> TerminalSession:
        spec, process = self.process.spec, self.process
        return TerminalSession(
            self.id, self._title, tuple(shown_command(spec.arguments)), spec.user or "user", self._size, self._created_at,
            len(self._viewers), process.pid, process.ended,
        )  # fmt: skip

    def attach(self, size: TerminalSize | None) -> _Viewer:
        if len(self._viewers) >= _VIEWERS_MAX:
            raise GuestError(f"the terminal {self.id} has {_VIEWERS_MAX} viewers", code="guest_resource_exhausted")
        viewer = _Viewer(next(self._numbers), size)
        # Who comes is told the size once: as he joins.
        self._fit(viewer)
        self._viewers.append(viewer)
        kept = self.process.kept_output
        viewer.push(TerminalJoined(self.describe(), viewer.number))
        if lost := self._written_bytes - len(kept):
            viewer.push(TerminalLost(lost))
        if kept:
            viewer.push(ProcessOutput("pty", kept))
        viewer.push(TerminalReplayed())
        if self.process.ended is not None:
            viewer.push(self.process.ended)
        return viewer

    def cut_off(self) -> None:
        """Its guest is gone; for its viewers that is no end of its program, which may go on elsewhere."""
        viewers, self._viewers = self._viewers, []
        for viewer in viewers:
            viewer.cut()

    def detach(self, viewer: _Viewer) -> None:
        if viewer in self._viewers:
            self._viewers.remove(viewer)
            self._fit()

    def resize(self, size: TerminalSize, number: int) -> None:
        if number:
            found = [viewer for viewer in self._viewers if viewer.number == number]
            if not found:
                raise NotFoundError(f"the terminal {self.id} has no viewer {number}", code="terminal_not_found")
            found[0].size = size
        elif not any(viewer.size for viewer in self._viewers):
            self._become(size)
        self._fit()

    def rename(self, title: str) -> None:
        before = self._title
        self.given_title = clean_title(title)
        self._tell_title(before)

    def _fit(self, joining: _Viewer | None = None) -> None:
        viewers = [*self._viewers, joining] if joining else self._viewers
        sizes = [viewer.size for viewer in viewers if viewer.size is not None]
        if sizes:
            self._become(TerminalSize(min(size.columns for size in sizes), min(size.rows for size in sizes)))

    def _become(self, size: TerminalSize) -> None:
        if size != self._size:
            self._size = size
            self.process.resize(size)
            self._push(TerminalResized(size))

    def _tell_title(self, before: str) -> None:
        if self._title != before:
            self._push(TerminalTitled(self._title))

    def _push(self, event: TerminalEvent) -> None:
        for viewer in self._viewers:
            viewer.push(event)

    # What its process says.

    def written(self, data: bytes) -> None:
        before = self._title
        self._output.read(data, self._written_bytes)
        self._written_bytes += len(data)
        self._tell_title(before)
        self._push(ProcessOutput("pty", data))

    def ended(self) -> None:
        assert self.process.ended is not None
        viewers, self._viewers = self._viewers, []
        for viewer in viewers:
            viewer.push(self.process.ended)


class _Guest(Protocol):
    next_terminal: int
    terminals: dict[str, FakeTerminal]

    def start(self, spec: ProcessSpec) -> FakeProcess: ...


class FakeTerminals:
    """GuestTerminals. ``guest`` finds a guest that answers; faults bear the names ``list_terminals``, ``open_terminal``..."""

    def __init__(self, guest: Callable[[str, str], Awaitable[_Guest]]) -> None:
        self._guest = guest

    async def _terminal(self, sandbox_id: str, operation: str, terminal: str) -> FakeTerminal:
        guest = await self._guest(sandbox_id, operation)
        found = guest.terminals.get(terminal)
        if found is None:
            raise NotFoundError(f"there is no terminal {terminal!r}", code="terminal_not_found")
        return found

    async def list(self, sandbox_id: str) -> list[TerminalSession]:
        guest = await self._guest(sandbox_id, "list_terminals")
        return [terminal.describe() for terminal in guest.terminals.values()]

    async def open(self, sandbox_id: str, spec: ProcessSpec, title: str = "") -> TerminalSession:
        guest = await self._guest(sandbox_id, "open_terminal")
        ended = [each.id for each in guest.terminals.values() if each.process.ended is not None]
        is_full = len(guest.terminals) >= _SESSIONS_MAX
        if is_full and not ended:
            raise GuestError(f"{_SESSIONS_MAX} terminals are open already", code="guest_resource_exhausted")
        terminal = FakeTerminal(f"{guest.next_terminal + 1:012x}", guest.start(spec))
        guest.next_terminal += 1
        terminal.given_title = clean_title(title)
        if is_full:
            del guest.terminals[ended[0]]
        guest.terminals[terminal.id] = terminal
        return terminal.describe()

    @asynccontextmanager
    async def attach(
        self, sandbox_id: str, terminal: str, size: TerminalSize | None = None
    ) -> AsyncGenerator[AsyncIterator[TerminalEvent]]:
        found = await self._terminal(sandbox_id, "attach_terminal", terminal)
        viewer = found.attach(size)
        try:
            yield viewer.follow()
        finally:
            found.detach(viewer)

    async def write(self, sandbox_id: str, terminal: str, data: bytes) -> None:
        found = await self._terminal(sandbox_id, "write_terminal", terminal)
        if found.process.ended is not None:
            raise GuestError(f"the program in terminal {terminal} has ended")
        await found.process.send_input(data, terminal=True)

    async def resize(self, sandbox_id: str, terminal: str, size: TerminalSize, viewer: int = 0) -> None:
        (await self._terminal(sandbox_id, "resize_terminal", terminal)).resize(size, viewer)

    async def rename(self, sandbox_id: str, terminal: str, title: str) -> TerminalSession:
        found = await self._terminal(sandbox_id, "rename_terminal", terminal)
        found.rename(title)
        return found.describe()

    async def close(self, sandbox_id: str, terminal: str) -> None:
        guest = await self._guest(sandbox_id, "close_terminal")
        found = await self._terminal(sandbox_id, "close_terminal", terminal)
        del guest.terminals[terminal]
        await found.process.close()
