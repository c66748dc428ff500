"""Finds what is new in a console of which only the newest bytes can be asked for."""

from __future__ import annotations

_PROBE_BYTES = 48


class ConsoleFollower:
    """Give it each answer in turn; it returns what was not in the one before. Where the two do not overlap (more was
    written in between than one answer holds), the whole answer is new."""

    def __init__(self) -> None:
        self._seen = b""

    def take(self, window: bytes) -> bytes:
        seen, self._seen = self._seen, window
        return window[overlap(seen, window) :]


def overlap(seen: bytes, window: bytes) -> int:
    """The length of the longest end of ``seen`` with which ``window`` begins."""
    probe = window[:_PROBE_BYTES]
    position = 0
    while probe and (position := seen.find(probe, position)) >= 0:
        if window.startswith(seen[position:]):
            return len(seen) - position
        position += 1
    # An overlap shorter than the probe.
    for length in range(min(len(seen), len(window), _PROBE_BYTES), 0, -1):
        if seen.endswith(window[:length]):
            return length
    return 0
