"""The service terminal.Terminal: sessions with a terminal that outlive every connection, with as many viewers as come.

Registered by ``program``, of Atelier's own making, in the form of E2B's services. Messages: ``Open {process, pty, title}``,
``Attach {terminal, size}`` (a stream, see ``terminal_session``), ``Write {terminal, pty}``, ``Resize {terminal, viewer,
size}``, ``Rename {terminal, title}``, ``Close {terminal}``, ``List {}``; ``Open`` and ``List`` answer with what ``describe``
gives. A session whose program has ended stays, with its output, until it is closed, for an hour, or until its room is needed.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from atelier.guest_agent.http import STREAM, Request, Response, Router
from atelier.guest_agent.program_request import (
    INPUT_SECONDS,
    input_of,
    integer,
    start_program,
    terminal_size,
    wrong,
)
from atelier.guest_agent.rpc import STREAM_HEADERS, Message, add_unary, keepalive_seconds, read_stream_request
from atelier.guest_agent.state import AgentState
from atelier.guest_agent.terminal_session import Size, TerminalSession
from atelier.guest_protocol.connect import ConnectError
from atelier.guest_protocol.terminal_output import clean_title

SERVICE: Final = "/terminal.Terminal/"

SESSIONS_MAX: Final = 32
_KEEP_ENDED_SECONDS: Final = 3600.0


class TerminalService:
    """The sessions of this guest, by id, oldest first."""

    def __init__(self, state: AgentState) -> None:
        self._state = state
        self._sessions: dict[str, TerminalSession] = {}

    def register(self, router: Router) -> None:
        router.add("POST", SERVICE + "Attach", self.attach, form=STREAM)
        add_unary(router, SERVICE + "List", self.list_terminals)
        add_unary(router, SERVICE + "Open", self.open)
        add_unary(router, SERVICE + "Write", self.write)
        add_unary(router, SERVICE + "Resize", self.resize)
        add_unary(router, SERVICE + "Rename", self.rename)
        add_unary(router, SERVICE + "Close", self.close)

    async def list_terminals(self, message: Message, request: Request) -> Message:
        self._forget_old()
        return {"terminals": [session.describe() for session in self._sessions.values()]}

    async def open(self, message: Message, request: Request) -> Message:
        title = _title(message)
        size = _positive(terminal_size(message))
        self._forget_old()
        gives_way = self._that_gives_way()
        user = self._state.user_of(request)
        spawned, config = start_program(message, self._state, user)
        session = TerminalSession(spawned, config, user.name, size, self._forget_old)
        session.given_title = title
        if gives_way is not None:
            self._sessions.pop(gives_way.id, None)
        self._sessions[session.id] = session
        return {"terminal": session.describe()}

    async def attach(self, request: Request) -> Response:
        message = await read_stream_request(request)
        size = _positive(terminal_size({"pty": message})) if message.get("size") is not None else None
        viewer = self._find(message).attach(size, keepalive_seconds(request))
        return Response(200, STREAM_HEADERS, viewer)

    async def write(self, message: Message, request: Request) -> Message:
        process = self._find(message).process
        kind, data = input_of(message)
        try:
            async with asyncio.timeout(INPUT_SECONDS):
                await process.write_input(data, to_terminal=kind == "pty")
        except TimeoutError:
            raise ConnectError(
                "deadline_exceeded", f"the program has not read all of its input within {INPUT_SECONDS:g} s"
            ) from None
        return {}

    async def resize(self, message: Message, request: Request) -> Message:
        size = _positive(terminal_size({"pty": message}))
        self._find(message).resize(integer(message.get("viewer", 0), "viewer"), size)
        return {}

    async def rename(self, message: Message, request: Request) -> Message:
        session = self._find(message)
        session.rename(_title(message))
        return {"terminal": session.describe()}

    async def close(self, message: Message, request: Request) -> Message:
        """Its viewers see the end of its program; it is listed no more."""
        session = self._find(message)
        del self._sessions[session.id]
        session.hang_up()
        return {}

    def _find(self, message: Message) -> TerminalSession:
        name = message.get("terminal")
        session = self._sessions.get(name) if isinstance(name, str) else None
        if session is None:
            raise ConnectError("not_found", f"there is no terminal {str(name)[:100]!r}")
        return session

    def _that_gives_way(self) -> TerminalSession | None:
        """Where there is no room for another one: that which ended first. Raises ConnectError if none has."""
        if len(self._sessions) < SESSIONS_MAX:
            return None
        ended = [session for session in self._sessions.values() if session.ended_at is not None]
        if not ended:
            raise ConnectError("resource_exhausted", f"{SESSIONS_MAX} terminals are open already")
        return min(ended, key=_ended_at)

    def _forget_old(self) -> None:
        before = time.monotonic() - _KEEP_ENDED_SECONDS
        for session in list(self._sessions.values()):
            if session.ended_at is not None and session.ended_at < before:
                del self._sessions[session.id]


def register(router: Router, state: AgentState) -> None:
    TerminalService(state).register(router)


def _ended_at(session: TerminalSession) -> float:
    return session.ended_at or 0.0


def _title(message: Message) -> str:
    title: Any = message.get("title", "")
    if not isinstance(title, str):
        raise wrong("title", "text")
    return clean_title(title)


def _positive(size: Size) -> Size:
    if 0 in size:
        raise wrong("cols and rows", "1 at least")
    return size
