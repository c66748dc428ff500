"""Holds back whatever could write to the guest's disk while that stands still for a snapshot.

One per agent (``AgentState``). ``quiesce`` closes and opens it; ``http_server`` lets new requests wait, ``http`` and
``direct_reader`` the bodies of those that are under way. The agent's one thread would otherwise block in a write to a
frozen file system, and nobody could ask it to thaw. It touches nothing of the system itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Gate:
    """Open at first. ``on_close``: called when it closes, by whoever takes data without waiting in between."""

    def __init__(self) -> None:
        self.is_open = True
        self.on_close: set[Callable[[], None]] = set()
        self._opened = asyncio.Event()

    def close(self) -> None:
        self.is_open = False
        self._opened.clear()
        for stop in tuple(self.on_close):
            stop()

    def open(self) -> None:
        self.is_open = True
        self._opened.set()

    async def opened(self) -> None:
        """Return once it is open."""
        while not self.is_open:
            await self._opened.wait()
