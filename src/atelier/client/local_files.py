"""Local ends of file copies: reading a file in pieces, and writing one so that no half of it is ever taken for whole.

Called by ``files.py``. A download is written beside its destination under a temporary name and renamed at the end;
a destination that is no ordinary file (``/dev/null``, a fifo) is written to directly.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from atelier.client.local_errors import local_error

CHUNK_BYTES = 256 * 1024

ProgressReporter = Callable[[int], None]
"""Called with the number of bytes just moved; must return at once."""


def read_pieces(file: BinaryIO, on_progress: ProgressReporter | None = None) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
        if on_progress is not None:
            on_progress(len(chunk))


def size_of(file: BinaryIO) -> int | None:
    """Bytes from the current position to the end, if it is an ordinary file that knows."""
    try:
        status = os.fstat(file.fileno())
        return status.st_size - file.tell() if stat.S_ISREG(status.st_mode) else None
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def open_for_reading(path: Path) -> Generator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise local_error(bytes(path), "read", error) from error
    with file:
        yield file


@contextlib.contextmanager
def replace_file(path: Path) -> Generator[BinaryIO]:
    """A file to write to, which takes ``path``'s place when the context ends well and vanishes when it does not.

    A link given as ``path`` is followed: the user named it. An existing file's permissions are kept.
    """
    try:
        path = Path(os.path.realpath(path))
        existing = path.stat() if path.exists() else None
        if existing is not None and not stat.S_ISREG(existing.st_mode):
            with path.open("wb") as direct:
                yield direct
            return
        # 0o600 while it is written; then what the umask leaves of 0o666, as for any new file.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise local_error(bytes(path), "write", error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), stat.S_IMODE(existing.st_mode) if existing else 0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            raise local_error(bytes(path), "write", error) from error
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
