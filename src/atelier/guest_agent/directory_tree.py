"""Walks and removes folder trees in slices, so that a big tree keeps nobody else waiting.

Called by ``filesystem``. A slice runs with the user's rights and awaits nothing; between slices the event loop goes
on. Links are never followed, and removal goes through open folders, so a folder that is swapped for a link while it is
being emptied leads nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import Generator, Iterator
from typing import Final, TypeVar

from atelier.guest_agent.credentials import Account, acting_as

SLICE_ENTRIES: Final = 256
ENTRIES_MAX: Final = 100_000

T = TypeVar("T")


async def run_in_slices(user: Account, work: Generator[None, None, T]) -> T:
    """Run ``work`` with the user's rights; at each of its ``yield`` the event loop gets its turn."""
    try:
        while True:
            with acting_as(user):
                try:
                    next(work)
                except StopIteration as end:
                    return end.value
            await asyncio.sleep(0)
    finally:
        with acting_as(user):
            work.close()


Components = tuple[bytes, ...]


def walk(root: bytes, depth: int, after: Components = ()) -> Iterator[Components]:
    """The names below ``root`` in sorted pre-order, as components relative to it, down to ``depth`` levels.

    ``after`` goes on behind an earlier walk's last entry. A folder below ``root`` that cannot be read is listed
    without content; ``root`` itself raises OSError.
    """
    pending: list[tuple[Components, bool]] = [((), True)]
    while pending:
        components, is_directory = pending.pop()
        if components and components > after:
            yield components
        if not is_directory or len(components) >= depth:
            continue
        if components < after and components != after[: len(components)]:
            continue
        try:
            with os.scandir(os.path.join(root, *components)) as entries:
                # A link is no folder here: it is not followed.
                names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError:
            if not components:
                raise
            continue
        pending.extend(((*components, name), below) for name, below in reversed(names))


def remove(path: bytes) -> Generator[None, None, None]:
    """Remove ``path`` whatever it is, in slices; what is already gone is no error. Raises OSError."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        try:
            os.rmdir(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        yield from _empty(path)
        os.rmdir(path)
    except FileNotFoundError:
        return


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


_OPEN_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _empty(path: bytes) -> Generator[None, None, None]:
    """Remove everything in the folder. One descriptor is open at a time, however deep the tree: the way up is ``..``,
    and it must lead to the very folder that we came from."""
    current = os.open(path, _OPEN_FOLDER)
    above: list[tuple[tuple[int, int], str]] = []
    done = 0
    try:
        while True:
            below = ""
            # Listed anew after each return: what is removed is gone from it, so this ends.
            with os.scandir(current) as entries:
                for entry in entries:
                    done += 1
                    if done % SLICE_ENTRIES == 0:
                        yield
                    if entry.is_dir(follow_symlinks=False):
                        try:
                            os.rmdir(entry.name, dir_fd=current)
                            continue
                        except OSError as error:
                            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                                raise
                        below = entry.name
                        break
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.name, dir_fd=current)
            if below:
                above.append((_identity(current), below))
                deeper = os.open(below, _OPEN_FOLDER, dir_fd=current)
                os.close(current)
                current = deeper
                continue
            if not above:
                return
            identity, name = above.pop()
            higher = os.open("..", _OPEN_FOLDER, dir_fd=current)
            os.close(current)
            current = higher
            if _identity(current) != identity:
                raise OSError(errno.EBUSY, "a folder was moved away while it was being removed")
            os.rmdir(name, dir_fd=current)
    finally:
        os.close(current)
