"""A new file whose content another process writes into a pipe: the writer never holds the file.

Called by the VMM drivers. So a process with a limit on its files can write a large one, it cannot change the file
afterwards, it may be kept waiting, and it sees a full disk as a reader that went away. Bytes go from pipe to file inside
the kernel. Source: pipe(7), fcntl(2), splice(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
import select
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from atelier.host.files import refusal_as_error, sync_folder
from atelier.model.errors import HostError

_T = TypeVar("_T")
_WIDE_BYTES = 1024 * 1024
"""Of a pipe: with less room writer and reader wait for each other all the time. As much as anybody may have."""
_NARROW_BYTES = 64 * 1024
_LOOK_AGAIN_MS = 100


class PipedFile:
    """``write_end`` is to be handed to the writer and then closed here with ``handed_over``."""

    def __init__(self, path: Path, file: int, limit_bytes: int, *, held: bool) -> None:
        self._path = path
        self._file = file
        self._limit_bytes = limit_bytes
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        self._allowed_bytes = 0 if held else math.inf
        """What may still be copied. Read and changed under the lock by both threads."""
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._abandoned = threading.Event()
        if held:
            self._set_room(_NARROW_BYTES)
        self._loop = asyncio.get_running_loop()
        self._copied: asyncio.Future[int] = self._loop.create_future()
        # Asked for by ``end`` only; an abandoned copy's failure is nobody's concern.
        self._copied.add_done_callback(lambda copied: copied.cancelled() or copied.exception())
        # A thread of its own, not one of the loop's few: it waits for others, who may need one of those.
        threading.Thread(target=self._run, name="piped file", daemon=True).start()

    def handed_over(self) -> None:
        """The pipe ends with its writer from now on."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def let_through(self, size_bytes: int) -> None:
        """Copy so much more, and no further until told; a writer that was held before waits when it has written 64 KiB
        beyond that, one that was not after as much as 1 MiB."""
        self._allow(size_bytes)

    def go_on(self) -> None:
        """Copy all that comes."""
        self._allow(math.inf)

    def _allow(self, size_bytes: float) -> None:
        with self._lock:
            self._allowed_bytes = size_bytes
        self._changed.set()

    async def end(self) -> int:
        """Wait until the writer has closed its end; how many bytes the file holds.

        Raises DiskFullError, HostError (``stream_too_long`` beyond the limit).
        """
        return await asyncio.shield(self._copied)

    async def keep(self, path: Path) -> None:
        """After ``end``: put the file on the disk under its name, in place of what bears it. Raises DiskFullError."""
        await asyncio.to_thread(self._keep, path)

    def _keep(self, path: Path) -> None:
        with refusal_as_error(f"writing {path}"):
            os.fsync(self._file)
            self._path.replace(path)
            sync_folder(path.parent)

    async def close(self) -> None:
        """Stop copying; what was not kept goes."""
        self.handed_over()
        self._abandoned.set()
        self._changed.set()
        await asyncio.wait([self._copied])
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            size_bytes = self._copy()
        except Exception as error:
            self._tell(self._copied.set_exception, error)
        else:
            self._tell(self._copied.set_result, size_bytes)

    def _tell(self, tell: Callable[[_T], None], outcome: _T) -> None:
        # The loop may have ended with its program.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(tell, outcome)

    def _copy(self) -> int:
        poll = select.poll()
        poll.register(self._read_end, select.POLLIN)
        size_bytes, is_wide = 0, False
        try:
            while not self._abandoned.is_set():
                self._changed.clear()
                with self._lock:
                    allowed_bytes = self._allowed_bytes
                if allowed_bytes == 0:
                    self._changed.wait(_LOOK_AGAIN_MS / 1000)
                    continue
                if allowed_bytes == math.inf and not is_wide:
                    self._set_room(_WIDE_BYTES)
                    is_wide = True
                if not poll.poll(_LOOK_AGAIN_MS) or self._changed.is_set():
                    continue
                at_most = int(min(allowed_bytes, _WIDE_BYTES))
                with refusal_as_error(f"writing {self._path}"):
                    moved = os.splice(self._read_end, self._file, at_most)
                with self._lock:
                    self._allowed_bytes = max(0, self._allowed_bytes - moved)
                if moved == 0:
                    break
                size_bytes += moved
                if size_bytes > self._limit_bytes:
                    raise HostError(
                        f"more than {self._limit_bytes} bytes came for {self._path}", code="stream_too_long"
                    )
        finally:
            # The writer's next bytes fail: it learns that nobody takes them.
            os.close(self._read_end)
        return size_bytes

    def _set_room(self, size_bytes: int) -> None:
        # A user may have no more than so much in all pipes together: then it stays as it is.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._read_end, fcntl.F_SETPIPE_SZ, size_bytes)


@asynccontextmanager
async def piped_file(
    path: Path, *, limit_bytes: int, mode: int = 0o600, held: bool = False
) -> AsyncGenerator[PipedFile]:
    """A new file at ``path``, for as long as the block runs or until it was kept under another name. ``held``: the writer
    waits when it has written 64 KiB, until ``let_through`` or ``go_on``.

    Raises DiskFullError, HostError (``not_writable``, ``folder_missing``).
    """
    try:
        with refusal_as_error(f"making {path}"):
            path.unlink(missing_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileNotFoundError as error:
        raise HostError(f"{path} cannot be made: there is no such folder", code="folder_missing") from error
    piped = PipedFile(path, file, limit_bytes, held=held)
    try:
        yield piped
    finally:
        await asyncio.shield(piped.close())
