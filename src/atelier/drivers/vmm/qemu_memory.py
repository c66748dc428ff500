"""The memory of machines that go on from an image: one sealed copy of its file for all of them.

Called by the QEMU driver. QEMU 7.2 opens a memory file for writing even where it maps it privately, so what it gets is
a copy that nobody can write. A copy is kept while it is likely to be needed again; machines hold it by themselves.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from atelier.host.sealed_memory import sealed_copy
from atelier.model.errors import VmmError

_KEPT_AT_MOST = 8
_KEPT_UNUSED_SECONDS = 600.0


@dataclass(slots=True)
class _Copy:
    descriptor: int
    source: tuple[int, int, int, int]
    used_at: float


class SealedImages:
    """Copies by the path of their file; one whose file is gone or another by now is dropped."""

    def __init__(self) -> None:
        self._copies: dict[Path, _Copy] = {}
        self._copying: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def opened(self, memory: Path, size_bytes: int) -> AsyncGenerator[int]:
        """A descriptor of the copy, for as long as the block runs.

        Raises VmmError (``restore_failed``) when the file is gone or of another size, HostError, DiskFullError.
        """
        lock = self._copying.setdefault(memory, asyncio.Lock())
        async with lock:
            self._drop_stale()
            copy = self._copies.get(memory)
            if copy is None:
                source = _identity(memory)
                if source is None or source[2] != size_bytes:
                    raise VmmError(
                        f"{memory} is not the memory of a machine with {size_bytes >> 20} MiB",
                        code="restore_failed",
                        hint="it is damaged or gone; start the sandbox from its disk",
                    )
                copy = _Copy(await asyncio.to_thread(sealed_copy, memory), source, 0.0)
                self._copies[memory] = copy
            copy.used_at = time.monotonic()
            descriptor = os.dup(copy.descriptor)
            self._drop_stale()
        asyncio.get_running_loop().call_later(_KEPT_UNUSED_SECONDS + 1, self._drop_stale)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _drop_stale(self) -> None:
        """And the longest unused of too many."""
        oldest = time.monotonic() - _KEPT_UNUSED_SECONDS
        newest_first = sorted(self._copies.items(), key=lambda item: item[1].used_at, reverse=True)
        for place, (path, copy) in enumerate(newest_first):
            if place >= _KEPT_AT_MOST or copy.used_at < oldest or copy.source != _identity(path):
                os.close(copy.descriptor)
                del self._copies[path]


def _identity(path: Path) -> tuple[int, int, int, int] | None:
    """Device, inode, size and time of change; None if there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
