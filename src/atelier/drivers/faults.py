"""Delays and failures that the fake drivers show on request. Every fake holds one ``Faults`` and asks it first thing.

Called by fakes only; real drivers never know it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from atelier.model.errors import AtelierError, HostError


class Faults:
    """``delay_seconds`` before each operation; those in ``hanging`` wait until ``release`` or their cancellation;
    ``fail_next`` makes calls fail. Operations bear the names of the driver's methods."""

    def __init__(self, *, delay_seconds: float = 0.0, hanging: Iterable[str] = ()) -> None:
        self.delay_seconds = delay_seconds
        self._released = {operation: asyncio.Event() for operation in hanging}
        self._failures: dict[str, list[AtelierError]] = {}

    def hang(self, operation: str) -> None:
        self._released.setdefault(operation, asyncio.Event())

    def release(self, operation: str) -> None:
        """Let the calls that hang go on, and hang no more."""
        if event := self._released.pop(operation, None):
            event.set()

    def fail_next(self, operation: str, error: AtelierError | None = None, *, times: int = 1) -> None:
        """The next ``times`` calls of ``operation`` raise ``error``, by default a HostError (``injected_fault``)."""
        failure = error or HostError(f"{operation} failed as it was told to", code="injected_fault")
        self._failures.setdefault(operation, []).extend([failure] * times)

    async def before(self, operation: str) -> None:
        """Be slow, hang or fail, as asked for this operation."""
        if self.delay_seconds > 0:
            await asyncio.sleep(self.delay_seconds)
        if event := self._released.get(operation):
            await event.wait()
        if failures := self._failures.get(operation):
            raise failures.pop(0)
