"""How much one key, or one address that signs in, may ask for: token buckets and open WebSockets. Called by the gate."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from atelier.model.errors import RateLimitedError

_BURST_SECONDS = 2.0
_BUCKETS_AT_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """0: no limit."""

    requests_per_second: float
    sign_ins_per_minute: float
    web_sockets: int


class _Buckets:
    """Each holds ``capacity`` and is filled at ``rate`` a second."""

    def __init__(self, rate: float, capacity: float, clock: Callable[[], float]) -> None:
        self._rate, self._capacity, self._clock = rate, capacity, clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> float:
        """0, or how many seconds to wait until there is something to take."""
        if not self._rate:
            return 0.0
        now = self._clock()
        level, at = self._levels.get(name, (self._capacity, now))
        level = min(self._capacity, level + (now - at) * self._rate)
        if level < 1:
            return (1 - level) / self._rate
        if len(self._levels) >= _BUCKETS_AT_MOST and name not in self._levels:
            self._drop_full(now)
        self._levels[name] = (level - 1, now)
        return 0.0

    def _drop_full(self, now: float) -> None:
        """Those that are full again say nothing; of the others, at worst, the older half."""
        left = {
            name: (level, at)
            for name, (level, at) in self._levels.items()
            if level + (now - at) * self._rate < self._capacity
        }
        self._levels = dict(list(left.items())[-_BUCKETS_AT_MOST // 2 :])


class RateLimits:
    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._requests = _Buckets(
            limits.requests_per_second, max(1.0, limits.requests_per_second * _BURST_SECONDS), clock
        )
        self._sign_ins = _Buckets(limits.sign_ins_per_minute / 60, max(1.0, limits.sign_ins_per_minute), clock)
        self._open: Counter[str] = Counter()

    def take_request(self, principal: str) -> None:
        """``principal``: id of the key or session. Raises RateLimitedError."""
        if wait := self._requests.take(principal):
            raise RateLimitedError(
                f"more than {self._limits.requests_per_second:g} requests a second with this key",
                retry_after_seconds=wait,
                hint="wait as long as Retry-After says; the manager's ATELIER_REQUESTS_PER_SECOND sets the limit",
            )

    def take_sign_in(self, address: str) -> None:
        """Raises RateLimitedError."""
        if wait := self._sign_ins.take(address):
            raise RateLimitedError(
                "too many attempts to sign in from this address",
                retry_after_seconds=wait,
                hint="wait as long as Retry-After says",
            )

    @contextmanager
    def web_socket(self, principal: str) -> Generator[None]:
        """For as long as it is open. Raises RateLimitedError (``too_many_web_sockets``)."""
        if self._limits.web_sockets and self._open[principal] >= self._limits.web_sockets:
            raise RateLimitedError(
                f"{self._limits.web_sockets} WebSockets are open with this key",
                code="too_many_web_sockets",
                retry_after_seconds=10,
                hint="close some; the manager's ATELIER_WEB_SOCKETS_PER_KEY sets the limit",
            )
        self._open[principal] += 1
        try:
            yield
        finally:
            self._open[principal] -= 1
            if not self._open[principal]:
                del self._open[principal]
