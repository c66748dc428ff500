"""How often and how fast something is tried again. Used by the executor; holds no state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """``attempts`` counts the first one too. Between two attempts lies ``first_delay_seconds``, doubled each time up to
    ``longest_delay_seconds``."""

    attempts: int
    first_delay_seconds: float
    longest_delay_seconds: float

    def delays_seconds(self) -> Iterator[float]:
        """The pauses between the attempts: one fewer than ``attempts``."""
        delay = self.first_delay_seconds
        for _ in range(self.attempts - 1):
            yield min(delay, self.longest_delay_seconds)
            delay *= 2


@dataclass(frozen=True, slots=True)
class RetryPolicies:
    """``transient``: a step's ``do`` that failed with an error worth trying again. ``forward``: any error past the
    pivot. ``undo``: any error of an undo. When ``forward`` or ``undo`` is used up the saga is stuck."""

    transient: RetryPolicy = RetryPolicy(3, 0.2, 2.0)
    forward: RetryPolicy = RetryPolicy(8, 0.2, 10.0)
    undo: RetryPolicy = RetryPolicy(6, 0.2, 5.0)
