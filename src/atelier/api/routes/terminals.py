"""One-shot terminals: a PTY in the sandbox over one WebSocket, lossless, held back by whoever reads it.

Frames as in ``terminal_relay``; to the client go ``started``, ``ended`` and ``failed``, in the form of exec's events.
Terminals with several viewers, that live on, are in ``terminal_sessions``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, WebSocket

from atelier.api.parameters import GuestUser, SandboxReference, services_of
from atelier.api.terminal_relay import Frames, relay, telling_failure
from atelier.model.guest import ProcessEnded, ProcessEvent, ProcessOutput, ProcessSpec, ProcessStarted, TerminalSize
from atelier.schemas.processes import EndedEvent, StartedEvent
from atelier.services.guest_sessions import LOGIN_SHELL

router = APIRouter(prefix="/sandboxes/{sandbox}", tags=["processes"])


@router.websocket("/pty")
async def open_terminal(
    socket: WebSocket,
    sandbox: SandboxReference,
    columns: Annotated[int, Query(ge=1, le=1000)] = 80,
    rows: Annotated[int, Query(ge=1, le=1000)] = 24,
    command: Annotated[list[str] | None, Query(max_length=4096)] = None,
    user: GuestUser = "",
    working_directory: str = "",
    pid: Annotated[int, Query(ge=0, le=2**31 - 1, description="attach to this terminal instead of starting one")] = 0,
) -> None:
    """Open a terminal, or attach to one by ``pid``. Closing the socket leaves the program running."""
    await socket.accept()

    async def serve() -> None:
        session = await services_of(socket).sessions.enter(sandbox)
        spec = ProcessSpec(
            arguments=tuple(command or LOGIN_SHELL),
            environment={"TERM": "xterm-256color"},
            working_directory=working_directory,
            user=user,
            stdin=True,
            terminal=TerminalSize(columns, rows),
        )
        pid_known: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if pid:
            pid_known.set_result(pid)

        async def write(data: bytes) -> None:
            await session.type_into(await pid_known, data)

        async def resize(size: TerminalSize) -> None:
            await session.driver.resize_terminal(session.sandbox_id, await pid_known, size)

        events = session.attach(pid, terminal=True) if pid else session.stream(spec)
        await relay(socket, _frames(events, pid_known), write, resize)

    await telling_failure(socket, serve())


async def _frames(events: AsyncGenerator[ProcessEvent], pid_known: asyncio.Future[int]) -> Frames:
    try:
        async for event in events:
            match event:
                case ProcessStarted():
                    if not pid_known.done():
                        pid_known.set_result(event.pid)
                    yield StartedEvent(pid=event.pid)
                case ProcessOutput():
                    yield event.data
                case ProcessEnded():
                    yield EndedEvent(exit_code=event.exit_code, status=event.status, error=event.error)
    finally:
        await events.aclose()
