"""The kernel's inotify through ctypes: opened, added to, read from. Knows nothing of paths' meaning.

Called by ``watch``; imported on the first watch only. Source: inotify(7), Linux include/uapi/linux/inotify.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from typing import Final

MODIFY: Final = 0x002
ATTRIB: Final = 0x004
MOVED_FROM: Final = 0x040
MOVED_TO: Final = 0x080
CREATE: Final = 0x100
DELETE: Final = 0x200
DELETE_SELF: Final = 0x400
MOVE_SELF: Final = 0x800
QUEUE_OVERFLOW: Final = 0x4000
IGNORED: Final = 0x8000
ONLY_FOLDERS: Final = 0x01000000
DO_NOT_FOLLOW: Final = 0x02000000
EXCLUDE_UNLINKED: Final = 0x04000000
IS_FOLDER: Final = 0x40000000

_HEADER: Final = struct.Struct("=iIII")
_READ_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Notice:
    """One ``struct inotify_event``. ``watch`` is -1 for an overflow; ``cookie`` ties the halves of a rename."""

    watch: int
    mask: int
    cookie: int
    name: bytes


class Inotify:
    """One inotify instance. Methods raise OSError."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def add(self, path: bytes, mask: int) -> int:
        return self._checked(
            self._libc.inotify_add_watch(self.descriptor, ctypes.c_char_p(path), ctypes.c_uint32(mask))
        )

    def remove(self, watch: int) -> None:
        """Forget a watch; one that the kernel has already dropped is no error."""
        self._libc.inotify_rm_watch(self.descriptor, watch)

    def read(self) -> list[Notice]:
        """What waits, up to 64 KiB of it; empty when nothing does."""
        try:
            buffer = os.read(self.descriptor, _READ_BYTES)
        except BlockingIOError:
            return []
        notices: list[Notice] = []
        position = 0
        while position + _HEADER.size <= len(buffer):
            watch, mask, cookie, length = _HEADER.unpack_from(buffer, position)
            position += _HEADER.size
            notices.append(Notice(watch, mask, cookie, buffer[position : position + length].rstrip(b"\0")))
            position += length
        return notices

    def close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)
