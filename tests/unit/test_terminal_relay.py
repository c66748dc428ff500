"""The relay between a WebSocket and a terminal: what its client hears when both sides end at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from fastapi import WebSocket
from pydantic import BaseModel

from atelier.api.terminal_relay import relay
from atelier.model.errors import GuestError
from atelier.model.guest import TerminalSize
from atelier.schemas.processes import EndedEvent


class Socket:
    """Types one key, then stays. ``sent``: what its client was sent, and how it was closed."""

    def __init__(self) -> None:
        self._typed = [{"type": "websocket.receive", "bytes": b"x"}]
        self.sent: list[object] = []

    async def receive(self) -> dict[str, Any]:
        if self._typed:
            return self._typed.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send_text(self, text: str) -> None:
        self.sent.append(text)

    async def close(self, code: int) -> None:
        self.sent.append(code)


async def write(data: bytes) -> None:
    raise GuestError("the program has ended")


async def resize(size: TerminalSize) -> None:
    raise AssertionError("nobody asks for it")


async def test_a_key_typed_after_the_end_does_not_hide_how_it_ended() -> None:
    async def frames() -> AsyncGenerator[bytes | BaseModel]:
        await asyncio.sleep(0.3)
        yield EndedEvent(exit_code=7, status="exit status 7", error="")

    socket = Socket()
    await relay(cast("WebSocket", socket), frames(), write, resize)
    assert '"exit_code":7' in str(socket.sent[0])
    assert socket.sent[1] == 1000


async def test_what_cannot_be_typed_is_told_where_nothing_ends() -> None:
    is_closed = False

    async def frames() -> AsyncGenerator[bytes | BaseModel]:
        nonlocal is_closed
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            is_closed = True

    with pytest.raises(GuestError, match="has ended"):
        await relay(cast("WebSocket", Socket()), frames(), write, resize)
    assert is_closed
