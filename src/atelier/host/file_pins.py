"""Second names for files that must stay when their first name goes: a hard link where there can be one, else a copy.

Called by the storage driver. Blocks for as long as a copy takes: to be called in a thread (``host.threads``).
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from atelier.host.file_copies import copy_file
from atelier.host.files import disk_full_as_error, sync_folder

_WRITE_BITS = 0o222


def ensure_pinned(source: Path, pin: Path, *, given_up: threading.Event | None = None) -> None:
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
                copy_file(source, unfinished, mode=0o400, given_up=given_up)
            mode = unfinished.stat().st_mode
            if mode & _WRITE_BITS:
                unfinished.chmod(mode & 0o777 & ~_WRITE_BITS)
            unfinished.rename(pin)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync_folder(pin.parent)


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
