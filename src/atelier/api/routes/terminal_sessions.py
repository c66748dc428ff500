"""Terminals of a sandbox that live on while nobody looks at them: list, open, change, close, and look at one.

A viewer's WebSocket has frames as in ``terminal_relay``; to it go ``joined``, the output that was kept, ``replayed``, what
follows, and ``lost``, ``title``, ``resized``, ``ended`` or ``failed`` as they come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, WebSocket

from atelier.api.parameters import SandboxReference, services_of, session_of
from atelier.api.terminal_relay import Frames, relay, telling_failure
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
from atelier.schemas.processes import EndedEvent
from atelier.schemas.terminals import (
    ChangeTerminalRequest,
    JoinedEvent,
    LostEvent,
    OpenTerminalRequest,
    ReplayedEvent,
    ResizedEvent,
    Terminal,
    TerminalList,
    TitleEvent,
    WindowSize,
)
from atelier.services.guest_sessions import LOGIN_SHELL, GuestSession

router = APIRouter(prefix="/sandboxes/{sandbox}/terminals", tags=["terminals"])

TerminalId = Annotated[str, Path(pattern="^[0-9a-z]{1,32}$")]
Entered = Annotated[GuestSession, Depends(session_of)]


@router.get("", operation_id="list_terminal_sessions")
async def list_terminal_sessions(
    request: Request,
    sandbox: SandboxReference,
    wake: Annotated[bool, Query(description="a use of the sandbox, which wakes a paused one")] = False,
) -> TerminalList:
    """Oldest first, those whose programs have ended included."""
    session = await services_of(request).sessions.enter(sandbox, is_use=wake)
    found = await session.driver.terminals.list(session.sandbox_id)
    return TerminalList(items=[_render(terminal) for terminal in found])


@router.post("", operation_id="open_terminal_session", status_code=201)
async def open_terminal_session(session: Entered, body: OpenTerminalRequest) -> Terminal:
    """Start a program in a terminal that goes on until it ends or is closed, whoever looks at it."""
    spec = ProcessSpec(
        arguments=tuple(body.command or LOGIN_SHELL),
        working_directory=body.working_directory,
        user=body.user,
        stdin=True,
        terminal=_size(body.size),
    )
    return _render(await session.driver.terminals.open(session.sandbox_id, spec, body.title))


@router.patch("/{terminal}", operation_id="change_terminal_session")
async def change_terminal_session(session: Entered, terminal: TerminalId, body: ChangeTerminalRequest) -> Terminal:
    if body.size is not None:
        await session.driver.terminals.resize(session.sandbox_id, terminal, _size(body.size))
    if body.title is not None:
        return _render(await session.driver.terminals.rename(session.sandbox_id, terminal, body.title))
    return _render(await session.find_terminal(terminal))


@router.delete("/{terminal}", operation_id="close_terminal_session", status_code=204)
async def close_terminal_session(session: Entered, terminal: TerminalId) -> None:
    """End its program, by force after 3 s."""
    await session.driver.terminals.close(session.sandbox_id, terminal)


@router.websocket("/{terminal}/attach")
async def attach_terminal_session(
    socket: WebSocket,
    sandbox: SandboxReference,
    terminal: TerminalId,
    columns: Annotated[int, Query(ge=1, le=1000)] = 80,
    rows: Annotated[int, Query(ge=1, le=1000)] = 24,
    wake: Annotated[bool, Query()] = True,
) -> None:
    """Look at a terminal in a window of this size, and type into it. The terminal is as large as the smallest window.
    ``wake`` false, for windows that come back by themselves: it is no use of the sandbox, and leaves a paused one so."""
    await socket.accept()

    async def serve() -> None:
        session = await services_of(socket).sessions.enter(sandbox, is_use=wake)
        terminals, sandbox_id = session.driver.terminals, session.sandbox_id
        viewer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def write(data: bytes) -> None:
            await session.type_into_terminal(terminal, data)

        async def resize(size: TerminalSize) -> None:
            await terminals.resize(sandbox_id, terminal, size, await viewer)

        events = session.view(terminal, TerminalSize(columns, rows))
        await relay(socket, _frames(events, viewer), write, resize)

    await telling_failure(socket, serve())


async def _frames(events: AsyncGenerator[TerminalEvent], viewer: asyncio.Future[int]) -> Frames:
    try:
        async for event in events:
            match event:
                case TerminalJoined():
                    if not viewer.done():
                        viewer.set_result(event.viewer)
                    yield JoinedEvent(terminal=_render(event.session))
                case ProcessOutput():
                    yield event.data
                case TerminalReplayed():
                    yield ReplayedEvent()
                case TerminalLost():
                    yield LostEvent(bytes=event.lost_bytes)
                case TerminalTitled():
                    yield TitleEvent(title=event.title)
                case TerminalResized():
                    yield ResizedEvent(columns=event.size.columns, rows=event.size.rows)
                case ProcessEnded():
                    yield EndedEvent(exit_code=event.exit_code, status=event.status, error=event.error)
    finally:
        await events.aclose()


def _render(terminal: TerminalSession) -> Terminal:
    ended = terminal.ended
    return Terminal(
        id=terminal.id,
        title=terminal.title,
        command=list(terminal.arguments),
        user=terminal.user,
        columns=terminal.size.columns,
        rows=terminal.size.rows,
        created_at=terminal.created_at,
        viewers=terminal.viewers,
        pid=terminal.pid,
        exit_code=None if ended is None else ended.exit_code,
        status="" if ended is None else ended.status,
    )


def _size(size: WindowSize) -> TerminalSize:
    return TerminalSize(size.columns, size.rows)
