"""Work that goes on whoever waits for it: tasks that outlive their callers and end with the manager.

Used by ``sandboxes``, and by what it is put together from. In memory only: what must outlive the manager is written down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class BackgroundTasks:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def unless_interrupted(self, work: Coroutine[Any, Any, _T]) -> _T:
        """``work`` goes on to its end also when its caller is cancelled: what is written must be begun, too."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:
                _logger.exception("%s ended unexpectedly", name)

        task = asyncio.create_task(guarded(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Cancelled before it began, it would never have been awaited.
        task.add_done_callback(lambda _: work.close())

    async def close(self) -> None:
        """Cancel all that is under way and wait until it has ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
