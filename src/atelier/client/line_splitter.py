"""Cuts a stream of bytes into lines at ``\\n`` and nowhere else (JSON may hold U+2028 and the like), within a bound."""

from __future__ import annotations

from collections.abc import Iterator

from atelier.model.errors import AtelierError

LINE_MAX_BYTES = 32 * 1024 * 1024


class LineSplitter:
    """Feed it chunks; it yields each complete, non-empty line without its end."""

    def __init__(self, max_bytes: int = LINE_MAX_BYTES) -> None:
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._max_bytes = max_bytes

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            whole = b"".join((*self._pieces, line)) if self._pieces else line
            self._pieces.clear()
            self._held_bytes = 0
            if whole:
                yield whole
        if rest:
            self._held_bytes += len(rest)
            if self._held_bytes > self._max_bytes:
                raise AtelierError(
                    f"the manager sent a line of more than {self._max_bytes} bytes", code="unexpected_answer"
                )
            self._pieces.append(rest)

    def has_rest(self) -> bool:
        """Whether the stream ended in the middle of a line."""
        return bool(self._pieces)
