"""Streams of events from a guest that end with a program's end: of processes, and of terminals.

Used by ``agent`` and ``terminals``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from atelier.drivers.guest.guest_http import GuestHttp, body_of, header
from atelier.drivers.guest.messages import Message, read_frames
from atelier.guest_protocol import connect
from atelier.model.errors import GuestProtocolError, TransientError
from atelier.model.guest import ProcessEnded

_EVENTS_PER_TURN: Final = 32
_END_SECONDS: Final = 1.0

_Event = TypeVar("_Event")


@asynccontextmanager
async def open_events(
    guest: GuestHttp,
    what: str,
    procedure: str,
    message: Message,
    parse: Callable[[Message], _Event | None],
    *,
    headers: Mapping[str, str] | None = None,
    absent: str,
) -> AsyncGenerator[AsyncIterator[_Event]]:
    """Call a procedure that answers with a stream. ``parse`` makes an event of a message, or None of one that says
    nothing; the last event is a ProcessEnded."""
    async with guest.open(
        what,
        "POST",
        f"/{procedure}",
        headers={"content-type": connect.CONTENT_TYPE_STREAM, **(headers or {})},
        body=connect.encode_envelope(connect.encode_json(message)),
        absent=absent,
        # A program may be silent for as long as it likes.
        stall_seconds=None,
    ) as response:
        if header(response, "content-type").partition(";")[0].strip() != connect.CONTENT_TYPE_STREAM:
            raise GuestProtocolError(f"{what}: the answer is no stream")
        yield _events(body_of(response), absent, parse)


async def _events(
    chunks: AsyncIterator[bytes], absent: str, parse: Callable[[Message], _Event | None]
) -> AsyncIterator[_Event]:
    """Up to ProcessEnded, which is held back until the stream has ended too: so its connection serves again."""
    frames = read_frames(chunks, absent=absent)
    taken = 0
    async for message in frames:
        taken += 1
        if taken % _EVENTS_PER_TURN == 0:
            # Tens of thousands of tiny ones may be here already: nothing else would make the loop serve others.
            await asyncio.sleep(0)
        event = parse(message)
        if event is None:
            continue
        if not isinstance(event, ProcessEnded):
            yield event
            continue
        try:
            async with asyncio.timeout(_END_SECONDS):
                async for _ in frames:
                    raise GuestProtocolError("the guest goes on after a process has ended")
                async for _ in chunks:
                    raise GuestProtocolError("the guest goes on after its stream has ended")
        except (TimeoutError, TransientError):
            # What the end frame says of a time limit, ``event.error`` has said already.
            pass
        yield event
        return
    raise GuestProtocolError("the guest ended a process's stream without saying how the process ended")
