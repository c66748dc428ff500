"""Carries a terminal over one WebSocket, both ways: for ``/pty`` and for the terminals that live on.

Binary frames are the terminal's bytes. Text frames are JSON: from the client ``{"type": "resize", "columns", "rows"}``,
what is of another form is passed over, so that newer clients may say more; to it what the route says. Closes with 1000 after
the program's end, with 4000 after a ``failed`` frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import WebSocket
from pydantic import BaseModel, Field, ValidationError
from starlette.websockets import WebSocketDisconnect

from atelier.model.errors import AtelierError
from atelier.model.guest import TerminalSize
from atelier.schemas.processes import FailedEvent

Frames = AsyncGenerator[bytes | BaseModel]
CLOSE_ENDED, CLOSE_FAILED = 1000, 4000
_END_SECONDS = 2.0


class _Resize(BaseModel):
    columns: int = Field(ge=1, le=1000)
    rows: int = Field(ge=1, le=1000)


async def relay(
    socket: WebSocket,
    frames: Frames,
    write: Callable[[bytes], Awaitable[None]],
    resize: Callable[[TerminalSize], Awaitable[None]],
) -> None:
    """Until the frames end or the client goes. Raises what the guest's side raises."""

    async def to_client() -> None:
        async for frame in frames:
            if isinstance(frame, bytes):
                await socket.send_bytes(frame)
            else:
                await socket.send_text(frame.model_dump_json())
        await socket.close(CLOSE_ENDED)

    async def to_guest() -> None:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if data := message.get("bytes"):
                await write(data)
            elif (text := message.get("text")) is not None and (size := _parse_resize(text)) is not None:
                await resize(size)

    showing, typing = tasks = asyncio.create_task(to_client()), asyncio.create_task(to_guest())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not showing.done() and typing.exception() is not None:
            # Perhaps something typed when the program had just ended: what is to be heard is how it did.
            await asyncio.wait({showing}, timeout=_END_SECONDS)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            (showing if showing.done() else typing).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await frames.aclose()


async def telling_failure(socket: WebSocket, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` on a socket that was accepted; an error goes to the client as a ``failed`` frame."""
    try:
        await work
    except AtelierError as error:
        failed = FailedEvent(code=error.code, message=error.message, hint=error.hint)
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await socket.send_text(failed.model_dump_json())
            await socket.close(CLOSE_FAILED, error.code)


def _parse_resize(text: str) -> TerminalSize | None:
    try:
        message = json.loads(text)
        if not isinstance(message, dict) or message.get("type") != "resize":  # pyright: ignore[reportUnknownMemberType]
            return None
        size = _Resize.model_validate(message)
    except (ValueError, RecursionError, ValidationError):
        return None
    return TerminalSize(size.columns, size.rows)
