"""Memory files that nobody can change any more, whoever holds them open.

Called by the VMM drivers: a VMM maps such a file privately, and neither it nor one that was broken out of can write
what the others read. Source: memfd_create(2), fcntl(2) F_ADD_SEALS.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from atelier.host.files import disk_full_as_error
from atelier.model.errors import HostError

_PIECE_BYTES = 16 * 1024 * 1024
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealed_copy(path: Path) -> int:
    """A descriptor of a sealed memory file with the content of ``path``, its holes left out: it takes as much memory as
    the file has blocks. Any user may open it by the descriptor. Blocks for as long as the copying takes.

    Raises HostError (``memory_file_unreadable``), DiskFullError.
    """
    try:
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}", code="memory_file_unreadable") from error
    try:
        copy = os.memfd_create("atelier-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with disk_full_as_error(f"copying {path} into memory"):
                os.ftruncate(copy, os.fstat(source).st_size)
                _copy_data(source, copy)
            fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(copy)
            raise
    except OSError as error:
        raise HostError(
            f"{path} could not be copied into memory: {error.strerror}",
            code="memory_file_unreadable",
            hint="see dmesg for errors of the disk",
        ) from error
    finally:
        os.close(source)
    return copy


def _copy_data(source: int, copy: int) -> None:
    position = 0
    while True:
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        end = os.lseek(source, position, os.SEEK_HOLE)
        os.lseek(copy, position, os.SEEK_SET)
        while position < end:
            copied = os.sendfile(copy, source, position, min(_PIECE_BYTES, end - position))
            if copied == 0:  # it got shorter
                return
            position += copied
