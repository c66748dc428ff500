"""How much of the resolver each guest may take: so many questions a second, so many at once. Pure but for the clock.

Called by ``dns_server``. Where all guests together have too much under way, the one with the most loses its oldest:
whoever asks little is served, whatever the others do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

_REMEMBERED_GUESTS = 4096


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class GuestRates:
    """A token bucket for each guest."""

    def __init__(self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: dict[IPv4Address, _Bucket] = {}

    def admit(self, guest: IPv4Address) -> bool:
        """Whether the guest may do it once more by now; it counts."""
        now = self._clock()
        bucket = self._buckets.get(guest)
        if bucket is None:
            if len(self._buckets) >= _REMEMBERED_GUESTS:
                self._forget_quiet_guests(now)
            bucket = self._buckets[guest] = _Bucket(self._burst, now)
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._per_second)
        bucket.filled_at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def _forget_quiet_guests(self, now: float) -> None:
        """Those whose buckets are full by now: they would get the same anew."""
        quiet = self._burst / self._per_second
        self._buckets = {guest: each for guest, each in self._buckets.items() if now - each.filled_at < quiet}


class GuestTasks:
    """What is under way for each guest: ``each`` at once for one, ``together`` for all."""

    def __init__(self, each: int, together: int) -> None:
        self._each = each
        self._together = together
        self._tasks: dict[IPv4Address, dict[asyncio.Task[None], None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def start(self, guest: IPv4Address, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Do the work in a task of its own; None where there is no place for it."""
        if not self._make_room(guest):
            work.close()
            return None
        task = asyncio.create_task(work)
        self._tasks.setdefault(guest, {})[task] = None
        self._count += 1
        task.add_done_callback(lambda done: self._remove(guest, done))
        return task

    async def close(self) -> None:
        tasks = [task for own in self._tasks.values() for task in own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _make_room(self, guest: IPv4Address) -> bool:
        own = len(self._tasks.get(guest, ()))
        if own >= self._each:
            return False
        if self._count < self._together:
            return True
        greediest, tasks = max(self._tasks.items(), key=lambda item: len(item[1]))
        if len(tasks) <= own + 1:
            return False
        oldest = next(iter(tasks))
        # It ends a little later; its place is free from now on.
        oldest.cancel()
        self._remove(greediest, oldest)
        return True

    def _remove(self, guest: IPv4Address, task: asyncio.Task[None]) -> None:
        tasks = self._tasks.get(guest, {})
        if task in tasks:
            del tasks[task]
            self._count -= 1
            if not tasks:
                del self._tasks[guest]
