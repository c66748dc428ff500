"""When a sandbox was last used. Written by ``services`` (in memory: it happens at each keystroke), read by
``time_limits``, which writes it down now and then.

Use is: a program run or attached to, for as long as somebody reads its output; input typed into a terminal; files read
or written; later SSH and web requests. No use: an open terminal in which nobody types, what programs do by themselves,
looking at state, figures and console, pings.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator
from datetime import UTC, datetime


def utc_now() -> datetime:
    return datetime.now(UTC)


class Activity:
    """The start of the manager counts as use: what came before it nobody has seen. ``now`` is the clock."""

    def __init__(self, now: Callable[[], datetime] = utc_now) -> None:
        self._now = now
        self._started_at = now()
        self._last: dict[str, datetime] = {}
        self._busy: Counter[str] = Counter()

    def touch(self, sandbox_id: str) -> None:
        self._last[sandbox_id] = self._now()

    @contextlib.contextmanager
    def in_use(self, sandbox_id: str) -> Generator[None]:
        """In use for as long as the block runs."""
        self._busy[sandbox_id] += 1
        try:
            yield
        finally:
            self._busy[sandbox_id] -= 1
            if not self._busy[sandbox_id]:
                del self._busy[sandbox_id]
            self.touch(sandbox_id)

    def last_active_at(self, sandbox_id: str, written: datetime | None) -> datetime:
        """``written``: what the row knows."""
        if sandbox_id in self._busy:
            return self._now()
        seen = self._last.get(sandbox_id, self._started_at)
        return max(seen, written) if written is not None else seen

    def forget(self, sandbox_id: str) -> None:
        self._last.pop(sandbox_id, None)
