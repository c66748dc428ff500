"""Second names for files that must stay when their first name goes: a hard link where there can be one, else a copy.

Called by the storage driver. A copy shares its blocks with the original where the file system can do that, and keeps
holes as holes. Blocks for as long as a copy takes: to be called in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from atelier.host.files import disk_full_as_error

_FICLONE = 0x40049409
"""Source: Linux include/uapi/linux/fs.h; ioctl_ficlone(2)."""
_PIECE_BYTES = 1024 * 1024
_WRITE_BITS = 0o222


def ensure_pinned(source: Path, pin: Path) -> None:
    """Have ``pin`` as a read-only file with the bytes of ``source``, whole and on disk; one that is there stays.

    For one caller at a time. Raises FileNotFoundError without a source, DiskFullError.
    """
    if pin.exists():
        return
    unfinished = pin.with_name(f".{pin.name}.new")
    source = source.resolve(strict=True)
    with disk_full_as_error(f"keeping {source.name} in {pin.parent}"):
        unfinished.unlink(missing_ok=True)
        try:
            if not _link(source, unfinished):
                _copy(source, unfinished)
            mode = unfinished.stat().st_mode
            if mode & _WRITE_BITS:
                unfinished.chmod(mode & 0o777 & ~_WRITE_BITS)
            unfinished.rename(pin)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _synchronize(pin.parent)


def _link(source: Path, target: Path) -> bool:
    """False where the two lie on two file systems, or this one or the kernel's settings allow no such link. A file of
    another user's is not linked: its owner could write to it."""
    if source.stat().st_uid != os.geteuid():
        return False
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _copy(source: Path, target: Path) -> None:
    with (
        source.open("rb", buffering=0) as original,
        os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400), "wb", 0) as copy,
    ):
        try:
            fcntl.ioctl(copy, _FICLONE, original.fileno())
        except OSError:
            # Not on one file system, or on one that shares no blocks.
            _copy_data(original.fileno(), copy.fileno())
        os.fsync(copy.fileno())


def _copy_data(original: int, copy: int) -> None:
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
            piece = os.pread(original, min(_PIECE_BYTES, end - position), position)
            if not piece:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            position += os.pwrite(copy, piece, position)


def _synchronize(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
