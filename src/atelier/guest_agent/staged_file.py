"""A file that is written aside and appears under its name only when it is complete.

Called by ``files``. A staged file has no name at all where the file system allows it (``O_TMPFILE``), so that not even
a killed agent leaves a trace; else a hidden one. Opening and publishing happen inside ``credentials.acting_as``, so the
file is the user's own and the kernel checks that the user may put it there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final

from atelier.guest_agent.entries import make_parents

TEMPORARY_PREFIX: Final = b".atelier-upload-"
REPLACING_MARK: Final = b"r"
NEW_MARK: Final = b"n"
"""The character behind the prefix tells ``watch`` whether the name existed before (it hides the temporary name)."""

_LINKS_MAX: Final = 40
_MODE_NEW: Final = 0o644
# What open(2) answers where O_TMPFILE is not known: the file system's or the kernel's word.
_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)


def _follow(path: bytes) -> bytes:
    """The file that a write to ``path`` means: links at its end are followed, missing targets included."""
    for _ in range(_LINKS_MAX):
        try:
            target = os.readlink(path)
        except OSError:
            return path
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


class StagedFile:
    """``open``, then write to ``descriptor``, then ``publish``; ``discard`` at any time and in the end."""

    def __init__(self, path: bytes, descriptor: int, temporary: bytes, replacing: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self._temporary = temporary
        self._has_name = False
        self._replacing = replacing

    @classmethod
    def open(cls, path: bytes) -> StagedFile:
        """Make the missing parent folders and an empty file beside ``path``; raises OSError.

        A file that is there must be a regular one and writable by the user, as if it were opened; its permission bits
        are kept.
        """
        target = _follow(path)
        folder = os.path.dirname(target)
        mode = _MODE_NEW
        try:
            status = os.stat(target, follow_symlinks=False)
        except FileNotFoundError:
            replacing = False
            make_parents(folder)
        else:
            replacing = True
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            # effective_ids: the check must be made for the ids in force, not for the agent's real uid.
            if not os.access(target, os.W_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            mode = status.st_mode & 0o777
        mark = REPLACING_MARK if replacing else NEW_MARK
        temporary = os.path.join(folder, TEMPORARY_PREFIX + mark + os.urandom(8).hex().encode())
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            staged = cls(target, os.open(folder, flags | os.O_TMPFILE, mode), temporary, replacing)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            staged = cls(
                target, os.open(temporary, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), temporary, replacing
            )
            staged._has_name = True
        if replacing:
            os.fchmod(staged.descriptor, mode)
        return staged

    def give_name(self) -> None:
        """Bind the complete content to its temporary name and close it; raises OSError."""
        if not self._has_name:
            # With a folder descriptor given, Python calls linkat with AT_SYMLINK_FOLLOW, which the magic link needs.
            root = os.open("/", os.O_PATH | os.O_CLOEXEC)
            try:
                os.link(f"/proc/self/fd/{self.descriptor}".encode(), self._temporary, src_dir_fd=root)
            finally:
                os.close(root)
            self._has_name = True
        self._close()

    def publish(self) -> None:
        """Put the content in the file's place; raises OSError."""
        self.give_name()
        os.rename(self._temporary, self.path)
        self._has_name = False

    def discard(self) -> None:
        """Drop what was not published."""
        self._close()
        if self._has_name:
            self._has_name = False
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def _close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)
