"""A lock between processes that a coroutine waits for: whoever builds the same thing at once builds it once.

Called by drivers with a shared cache. ``host.files.lock_folder`` is the other kind: it refuses instead of waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path

from atelier.host.files import disk_full_as_error

_POLL_SECONDS = 0.1


@contextlib.asynccontextmanager
async def hold_lock(lock_file: Path, *, on_wait: Callable[[], None] | None = None) -> AsyncGenerator[None, None]:
    """Hold ``lock_file`` exclusively, waiting for its present holder; ``on_wait`` is called once if there is one.

    The lock also ends with this process. The file stays: removing it would let two holders lock two files of one name.
    Coroutines of one process exclude each other too, since each opens the file anew.
    """
    with disk_full_as_error(f"locking {lock_file}"):
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(lock_file)
    try:
        waiting = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting and on_wait is not None:
                    on_wait()
                waiting = True
                # A blocking flock in a thread could not be cancelled.
                await asyncio.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def open_lock(lock_file: Path) -> int:
    """A descriptor of it, which is not held yet. A process that inherits it holds what is held by it, too. Raises OSError."""
    return os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def hold_opened(descriptor: int) -> Generator[None]:
    """Hold the lock of ``open_lock``. Waits for its present holder with the whole thread."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
