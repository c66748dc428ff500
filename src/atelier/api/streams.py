"""Long answers: NDJSON, server-sent events, and raw bytes; none of them buffers more than one piece.

An error after the status line was sent cannot change the status: NDJSON streams end with a ``failed`` line, raw
streams are cut off, so that no client takes half an answer for a whole one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from atelier.model.errors import AtelierError
from atelier.schemas.events import Event
from atelier.schemas.processes import FailedEvent

logger = logging.getLogger(__name__)

NDJSON = "application/x-ndjson"
_HEARTBEAT_SECONDS = 15.0

_T = TypeVar("_T")


def ndjson(events: AsyncGenerator[BaseModel]) -> StreamingResponse:
    """One JSON object per line. ``events`` must have begun without error: see ``begun``. They are closed with the
    response, also when the client goes away, and not some time later by the collector."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event.model_dump_json().encode() + b"\n"
        except AtelierError as error:
            failed = FailedEvent(code=error.code, message=error.message, hint=error.hint)
            yield failed.model_dump_json().encode() + b"\n"

    return StreamingResponse(lines(), media_type=NDJSON, headers={"X-Accel-Buffering": "no"})


async def begun(events: AsyncGenerator[_T]) -> AsyncGenerator[_T]:
    """Wait for the first element, so that an error before it becomes an ordinary error answer with its own status."""
    first: list[_T] = []
    with contextlib.suppress(StopAsyncIteration):
        first.append(await anext(events))

    async def all_of_them() -> AsyncGenerator[_T]:
        async with contextlib.aclosing(events):
            for element in first:
                yield element
            async for element in events:
                yield element

    return all_of_them()


def server_sent_events(events: AsyncIterator[Event]) -> StreamingResponse:
    """``text/event-stream`` with a comment every 15 s, so that proxies and clients see a live connection."""

    async def lines() -> AsyncIterator[bytes]:
        # Begun before the client is told that it is connected: what happens from then on is in the stream.
        pending = asyncio.ensure_future(anext(events))
        try:
            await asyncio.sleep(0)
            yield b": connected\n\n"
            while True:
                done, _ = await asyncio.wait({pending}, timeout=_HEARTBEAT_SECONDS)
                if not done:
                    yield b": alive\n\n"
                    continue
                try:
                    event = pending.result()
                except StopAsyncIteration:
                    return
                yield f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()
                pending = asyncio.ensure_future(anext(events))
        finally:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, AtelierError):
                await pending

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


async def unless_disconnected(request: Request, work: Callable[[], Awaitable[_T]]) -> _T:
    """Await ``work()``; if the client goes away first, cancel it (its ``finally`` blocks run) and re-raise."""
    task = asyncio.ensure_future(work())

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await task
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
