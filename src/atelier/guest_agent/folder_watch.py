"""Turns the kernel's notices about a folder into the events that E2B's clients know.

Made by ``watch`` for one client's wish. An upload through ``files`` shows as CREATE (if the name is new), CHMOD, WRITE,
its temporary name never. The queue is bounded; what does not fit is counted and marked by an event of type
``EVENT_TYPE_UNSPECIFIED`` with our field ``lost``, which E2B's clients skip.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import os
from collections import deque
from collections.abc import Generator
from typing import Any, Final

from atelier.guest_agent import inotify
from atelier.guest_agent.credentials import acting_as
from atelier.guest_agent.directory_tree import SLICE_ENTRIES
from atelier.guest_agent.entries import describe, is_text, show
from atelier.guest_agent.staged_file import NEW_MARK, TEMPORARY_PREFIX
from atelier.guest_agent.users import User, UserDirectory

QUEUE_MAX_EVENTS: Final = 4096
FOLDERS_MAX: Final = 16_384
_UPLOADS_MAX: Final = 256
_READS_MAX: Final = 64
_MASK: Final = (
    inotify.MODIFY
    | inotify.ATTRIB
    | inotify.MOVED_FROM
    | inotify.MOVED_TO
    | inotify.CREATE
    | inotify.DELETE
    | inotify.DELETE_SELF
    | inotify.MOVE_SELF
    | inotify.ONLY_FOLDERS
    | inotify.EXCLUDE_UNLINKED
)
_TYPES: Final = (
    (inotify.CREATE | inotify.MOVED_TO, "EVENT_TYPE_CREATE"),
    (inotify.MODIFY, "EVENT_TYPE_WRITE"),
    (inotify.ATTRIB, "EVENT_TYPE_CHMOD"),
    (inotify.DELETE, "EVENT_TYPE_REMOVE"),
    (inotify.MOVED_FROM, "EVENT_TYPE_RENAME"),
)

FileEvent = dict[str, Any]
"""``filesystem.FilesystemEvent`` in its JSON form; ``nameBytes`` (base64) is ours, for names that are no UTF-8."""


class FolderWatch:
    """Watches ``root``; with ``recursive`` everything below it, folders to come included.

    ``begin`` once (in slices), then ``take`` the events that are there, or ``wait`` for some; ``close`` in the end.
    """

    def __init__(self, root: bytes, user: User, users: UserDirectory, *, recursive: bool, include_entry: bool) -> None:
        """Raises OSError when the kernel gives no more inotify instances."""
        self._root = root
        self._user = user
        self._users = users
        self._recursive = recursive
        self._include_entry = include_entry
        self._kernel = inotify.Inotify()
        self._folders: dict[int, bytes] = {}
        self._seeded: set[bytes] = set()
        self._uploads: dict[int, bytes] = {}
        self._queue: deque[FileEvent] = deque()
        self._lost = 0
        self._waiter: asyncio.Future[None] | None = None
        self._listening = False
        self.ended = False

    def begin(self) -> Generator[None, None, None]:
        """Place the watches, in slices and with the user's rights; raises OSError."""
        self._add(b"", follow=True)
        if self._recursive:
            yield from self._add_below(b"", announce=False, strict=True)

    def take(self, limit: int = QUEUE_MAX_EVENTS) -> list[FileEvent]:
        """The events so far, oldest first, up to ``limit``. What the kernel holds is read first; nothing is awaited."""
        self._drain()
        taken = [self._queue.popleft() for _ in range(min(limit, len(self._queue)))]
        if self._lost and not self._queue:
            taken.append(self._loss_mark())
        return taken

    async def wait(self, timeout_seconds: float) -> bool:
        """True when ``take`` has something or the watch has ended, False when the time is over."""
        loop = asyncio.get_running_loop()
        if not self._listening:
            self._listening = True
            loop.add_reader(self._kernel.descriptor, self._drain)
        if self._queue or self._lost or self.ended:
            return True
        self._waiter = loop.create_future()
        try:
            await asyncio.wait_for(self._waiter, timeout_seconds)
        except TimeoutError:
            return False
        finally:
            self._waiter = None
        return True

    def close(self) -> None:
        if self._listening:
            self._listening = False
            asyncio.get_running_loop().remove_reader(self._kernel.descriptor)
        self._kernel.close()
        self.ended = True

    # Watches.

    def _path(self, relative: bytes) -> bytes:
        return os.path.join(self._root, relative) if relative else self._root

    def _add(self, relative: bytes, *, follow: bool = False) -> None:
        if len(self._folders) >= FOLDERS_MAX:
            raise OSError(errno.ENOSPC, "too many folders to watch")
        mask = _MASK if follow else _MASK | inotify.DO_NOT_FOLLOW
        self._folders[self._kernel.add(self._path(relative), mask)] = relative

    def _add_below(self, relative: bytes, *, announce: bool, strict: bool = False) -> Generator[None, None, None]:
        """Watch the folders below ``relative``. ``announce``: its content came before the watch did, so tell of it.
        Without ``strict`` a folder that went away or is closed to the user is passed over."""
        pending = [relative]
        seen = 0
        while pending:
            folder = pending.pop()
            try:
                with os.scandir(self._path(folder)) as entries:
                    names = [
                        (os.path.join(folder, entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries
                    ]
            except OSError:
                if strict and folder == relative:
                    raise
                continue
            for name, is_folder in names:
                seen += 1
                if seen % SLICE_ENTRIES == 0:
                    yield
                if announce and not os.path.basename(name).startswith(TEMPORARY_PREFIX):
                    self._seeded.add(name)
                    self._put(name, "EVENT_TYPE_CREATE")
                if is_folder:
                    try:
                        self._add(name)
                    except OSError as error:
                        if error.errno == errno.ENOSPC and strict:
                            raise
                        if error.errno == errno.ENOSPC:
                            self._lose()
                        continue
                    pending.append(name)

    def _forget_below(self, relative: bytes) -> None:
        inside = relative + b"/"
        for watch, folder in list(self._folders.items()):
            if folder == relative or folder.startswith(inside):
                self._kernel.remove(watch)
                del self._folders[watch]

    # Notices.

    def _drain(self) -> None:
        if self._kernel.descriptor < 0:
            return
        with acting_as(self._user):
            # Bounded: a folder that changes faster than it is read must not keep the event loop.
            for _ in range(_READS_MAX):
                notices = self._kernel.read()
                if not notices:
                    break
                for notice in notices:
                    self._translate(notice)
        if self._waiter is not None and not self._waiter.done() and (self._queue or self._lost or self.ended):
            self._waiter.set_result(None)

    def _translate(self, notice: inotify.Notice) -> None:
        mask = notice.mask
        if mask & inotify.QUEUE_OVERFLOW:
            self._lose()
            if self._recursive:
                # Folders may have come in what was lost; adding a watch twice gives the same number again.
                for _ in self._add_below(b"", announce=False):
                    pass
            return
        folder = self._folders.get(notice.watch)
        if folder is None:
            return
        if not notice.name:
            self._about_itself(notice, folder)
            return
        name = os.path.join(folder, notice.name)
        if notice.name.startswith(TEMPORARY_PREFIX):
            if mask & inotify.MOVED_FROM and len(self._uploads) < _UPLOADS_MAX:
                self._uploads[notice.cookie] = notice.name[len(TEMPORARY_PREFIX) :]
            return
        upload = self._uploads.pop(notice.cookie, None) if mask & inotify.MOVED_TO else None
        if upload is not None:
            if upload.startswith(NEW_MARK):
                self._put(name, "EVENT_TYPE_CREATE")
            self._put(name, "EVENT_TYPE_CHMOD")
            self._put(name, "EVENT_TYPE_WRITE")
            return
        if mask & inotify.ATTRIB and self._is_nameless(notice.name, name):
            return
        if mask & (inotify.CREATE | inotify.MOVED_TO) and name in self._seeded:
            self._seeded.discard(name)
            return
        if mask & (inotify.DELETE | inotify.MOVED_FROM):
            self._seeded.discard(name)
        for bits, event_type in _TYPES:
            if mask & bits:
                self._put(name, event_type)
                break
        if self._recursive and mask & inotify.IS_FOLDER:
            self._follow_folder(mask, name)

    def _about_itself(self, notice: inotify.Notice, folder: bytes) -> None:
        if notice.mask & inotify.IGNORED:
            del self._folders[notice.watch]
        if folder:
            return
        if notice.mask & inotify.DELETE_SELF:
            self._put(b".", "EVENT_TYPE_REMOVE")
            self.ended = True
        elif notice.mask & inotify.MOVE_SELF:
            self._put(b".", "EVENT_TYPE_RENAME")
            self.ended = True

    def _follow_folder(self, mask: int, name: bytes) -> None:
        if mask & inotify.MOVED_FROM:
            self._forget_below(name)
            return
        if not mask & (inotify.CREATE | inotify.MOVED_TO):
            return
        try:
            self._add(name)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._lose()
            return
        for _ in self._add_below(name, announce=bool(mask & inotify.CREATE)):
            pass

    def _is_nameless(self, name: bytes, relative: bytes) -> bool:
        """Whether the notice is about a file without a name (O_TMPFILE): the kernel calls it ``#<inode number>``."""
        return name.startswith(b"#") and name[1:].isdigit() and not os.path.lexists(self._path(relative))

    # The queue.

    def _put(self, relative: bytes, event_type: str) -> None:
        # Room for the mark is kept.
        if len(self._queue) >= QUEUE_MAX_EVENTS - 1:
            self._lost += 1
            return
        if self._lost:
            self._queue.append(self._loss_mark())
        event: FileEvent = {"name": show(relative), "type": event_type}
        if not is_text(relative):
            event["nameBytes"] = base64.b64encode(relative).decode()
        if self._include_entry and event_type not in ("EVENT_TYPE_REMOVE", "EVENT_TYPE_RENAME"):
            with contextlib.suppress(OSError):
                event["entry"] = describe(self._path(relative), self._users)
        self._queue.append(event)

    def _lose(self) -> None:
        self._lost += 1

    def _loss_mark(self) -> FileEvent:
        lost, self._lost = self._lost, 0
        return {"name": "", "type": "EVENT_TYPE_UNSPECIFIED", "lost": lost}
