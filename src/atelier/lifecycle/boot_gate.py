"""How many guests boot at once. Without KVM a boot is seconds of one processor: twenty at once would all miss their
time limit, where two by two they are all in time. Used by ``sandbox_create``; in memory only.
"""

from __future__ import annotations

import asyncio


class BootGate:
    """``enter`` before a machine starts, ``leave`` when its guest answers or it is gone; both may be called twice."""

    def __init__(self, places: int | None) -> None:
        """``places`` None: no limit."""
        self._semaphore = None if places is None else asyncio.Semaphore(places)
        self._inside: set[str] = set()

    async def enter(self, sandbox_id: str) -> None:
        if self._semaphore is None or sandbox_id in self._inside:
            return
        await self._semaphore.acquire()
        self._inside.add(sandbox_id)

    def leave(self, sandbox_id: str) -> None:
        if self._semaphore is not None and sandbox_id in self._inside:
            self._inside.discard(sandbox_id)
            self._semaphore.release()
