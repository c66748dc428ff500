"""Terminals: a PTY in the sandbox over one WebSocket.

Binary frames are the terminal's bytes, both ways. Text frames are JSON: from the client ``{"type": "resize", "columns",
"rows"}``; to it ``started``, ``ended`` and ``failed``, in the form of exec's events.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, WebSocket
from pydantic import BaseModel, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from atelier.api.parameters import GuestUser, SandboxReference
from atelier.api.services import Services
from atelier.model.errors import AtelierError
from atelier.model.guest import ProcessEnded, ProcessEvent, ProcessOutput, ProcessSpec, ProcessStarted, TerminalSize
from atelier.schemas.processes import EndedEvent, FailedEvent, StartedEvent
from atelier.services.guest_sessions import GuestSession

router = APIRouter(prefix="/sandboxes/{sandbox}", tags=["processes"])

_LOGIN_SHELL = ["/bin/bash", "-l"]
_CLOSE_ENDED, _CLOSE_FAILED = 1000, 4000


class _Resize(BaseModel):
    columns: int = Field(ge=1, le=1000)
    rows: int = Field(ge=1, le=1000)


@router.websocket("/pty")
async def open_terminal(
    socket: WebSocket,
    sandbox: SandboxReference,
    columns: Annotated[int, Query(ge=1, le=1000)] = 80,
    rows: Annotated[int, Query(ge=1, le=1000)] = 24,
    command: Annotated[list[str] | None, Query(max_length=4096)] = None,
    user: GuestUser = "",
    working_directory: str = "",
    pid: Annotated[int, Query(ge=0, description="attach to this terminal instead of starting one")] = 0,
) -> None:
    """Open a terminal, or attach to one by ``pid``. Closing the socket leaves the program running."""
    await socket.accept()
    services = socket.app.state.services
    assert isinstance(services, Services)
    try:
        session = await services.sessions.enter(sandbox)
        spec = ProcessSpec(
            arguments=tuple(command or _LOGIN_SHELL),
            environment={"TERM": "xterm-256color"},
            working_directory=working_directory,
            user=user,
            stdin=True,
            terminal=TerminalSize(columns, rows),
        )
        await _relay(socket, session, session.attach(pid, terminal=True) if pid else session.stream(spec), pid)
    except AtelierError as error:
        failed = FailedEvent(code=error.code, message=error.message, hint=error.hint)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.send_text(failed.model_dump_json())
            await socket.close(_CLOSE_FAILED, error.code)


async def _relay(
    socket: WebSocket, session: GuestSession, events: AsyncGenerator[ProcessEvent], attached_pid: int
) -> None:
    pid_known: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    if attached_pid:
        pid_known.set_result(attached_pid)

    async def to_client() -> None:
        async for event in events:
            match event:
                case ProcessStarted():
                    if not pid_known.done():
                        pid_known.set_result(event.pid)
                    await socket.send_text(StartedEvent(pid=event.pid).model_dump_json())
                case ProcessOutput():
                    await socket.send_bytes(event.data)
                case ProcessEnded():
                    ended = EndedEvent(exit_code=event.exit_code, status=event.status, error=event.error)
                    await socket.send_text(ended.model_dump_json())
        await socket.close(_CLOSE_ENDED)

    async def to_guest() -> None:
        pid = await pid_known
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if data := message.get("bytes"):
                await session.type_into(pid, data)
            elif (text := message.get("text")) is not None and (size := _parse_resize(text)) is not None:
                await session.driver.resize_terminal(session.sandbox_id, pid, size)

    tasks = {asyncio.create_task(to_client()), asyncio.create_task(to_guest())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await events.aclose()


def _parse_resize(text: str) -> TerminalSize | None:
    """Text frames of an unknown form are passed over, so that newer clients may say more."""
    try:
        message = json.loads(text)
        if not isinstance(message, dict) or message.get("type") != "resize":  # pyright: ignore[reportUnknownMemberType]
            return None
        size = _Resize.model_validate(message)
    except (ValueError, RecursionError, ValidationError):
        return None
    return TerminalSize(size.columns, size.rows)
