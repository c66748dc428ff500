"""Whole copies of files, and their checksums. Holes stay holes; blocks are shared where the file system can do that.

Called by ``host.file_pins`` and ``host.disk_images``, and by storage for checksums. Blocks for as long as it takes: to
be called in a thread (``host.threads``), which ``given_up`` ends between two pieces, with InterruptedError.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
from pathlib import Path

_FICLONE = 0x40049409
"""Source: Linux include/uapi/linux/fs.h; ioctl_ficlone(2)."""
_PIECE_BYTES = 1024 * 1024


def copy_file(source: Path, target: Path, *, mode: int, given_up: threading.Event | None = None) -> None:
    """Make ``target``, which must not be there, with the bytes of ``source``; its bytes are on disk then.

    A copy that was not finished stays, for the caller to remove.
    """
    with (
        source.open("rb", buffering=0) as original,
        os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb", 0) as copy,
    ):
        try:
            fcntl.ioctl(copy, _FICLONE, original.fileno())
        except OSError:
            # Not on one file system, or on one that shares no blocks.
            _copy_data(original.fileno(), copy.fileno(), given_up)
        os.fsync(copy.fileno())


def sha256_of_file(path: Path, *, given_up: threading.Event | None = None) -> str:
    """In hexadecimal, as ``sha256sum`` says it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            _check(given_up)
            digest.update(piece)
    return digest.hexdigest()


def _copy_data(original: int, copy: int, given_up: threading.Event | None) -> None:
    size = os.fstat(original).st_size
    os.ftruncate(copy, size)
    position = 0
    while position < size:
        try:
            position = os.lseek(original, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole is left
            raise
        end = os.lseek(original, position, os.SEEK_HOLE)
        while position < end:
            _check(given_up)
            piece = os.pread(original, min(_PIECE_BYTES, end - position), position)
            if not piece:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            position += os.pwrite(copy, piece, position)


def _check(given_up: threading.Event | None) -> None:
    if given_up is not None and given_up.is_set():
        raise InterruptedError
