"""Files and folders as the host side needs them: locks, whole-file replacement, private folders, bounded tails.

Called by drivers and programs. All calls are short and synchronous. Nothing here knows what a file means, and nothing
here follows a symbolic link that somebody else could have put in the way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Generator
from pathlib import Path

from atelier.model.errors import AlreadyRunningError, DiskFullError, HostError

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class FolderLock:
    """A held lock; it ends with ``release``, with its ``with`` block, or with the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_folder(lock_file: Path) -> FolderLock:
    """Take the folder that ``lock_file`` lies in for this process alone.

    The file stays when the lock is released: removing it would let two holders lock two files of the same name.
    Raises AlreadyRunningError, with the holder's pid where it is known.
    """
    with refusal_as_error(f"locking {lock_file.parent}"):
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            who = f" (process {holder})" if holder.isdigit() else ""
            raise AlreadyRunningError(
                f"the folder {lock_file.parent} is already in use by another manager{who}",
                hint="stop that one first, or choose another folder with ATELIER_DATA_DIR",
            ) from None
        os.ftruncate(descriptor, 0)
        with disk_full_as_error(f"locking {lock_file.parent}"):
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return FolderLock(descriptor)


def is_folder_locked(lock_file: Path) -> bool:
    """Whether some process holds the folder now. Leaves no trace."""
    try:
        descriptor = os.open(lock_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def ensure_folder_absent(folder: Path) -> None:
    """With all that is in it. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def ensure_private_folder(folder: Path) -> None:
    """Have ``folder`` as a real folder of this user's, mode 0700. Parents are made as needed.

    Raises HostError (``folder_not_ours``) when it belongs to somebody else or is a symbolic link, as it could in /tmp.
    """
    with refusal_as_error(f"making the folder {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise HostError(
            f"{folder} is not a folder of this user's",
            code="folder_not_ours",
            hint="remove it, or choose another place",
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        with refusal_as_error(f"closing the folder {folder} to others"):
            folder.chmod(0o700)


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Replace ``path`` with ``content``: a reader sees the old or the new whole, with ``durable`` also after a power
    cut (which waits for the disk; without it the file is for this boot only).

    Raises DiskFullError, HostError (``not_writable``).
    """
    with refusal_as_error(f"writing {path}"):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk: a rename alone may be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write below ``folder``."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def occupied_bytes(*paths: Path) -> int:
    """What these files, as far as they are there, really occupy on disk."""
    count = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            # Source: stat(2): st_blocks counts 512 bytes each, whatever the file system's block size.
            count += path.stat().st_blocks * 512
    return count


@contextlib.contextmanager
def disk_full_as_error(doing: str) -> Generator[None]:
    """Turn "no space left" and "quota exceeded" into DiskFullError; ``doing`` completes "no space left while ..."."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise disk_full(doing) from error
        raise


@contextlib.contextmanager
def refusal_as_error(doing: str) -> Generator[None]:
    """As ``disk_full_as_error``, and turn missing rights and read-only file systems into HostError (``not_writable``)."""
    try:
        with disk_full_as_error(doing):
            yield
    except OSError as error:
        if error.errno in _NOT_ALLOWED:
            raise HostError(
                f"{doing} was refused: {error.strerror}",
                code="not_writable",
                hint="check owner and permissions, and that the file system is not mounted read-only",
            ) from error
        raise


def disk_full(doing: str) -> DiskFullError:
    return DiskFullError(f"no space left while {doing}", hint="free some space or remove sandboxes, then try again")


def read_tail(path: Path, limit_bytes: int) -> bytes:
    """The last bytes of a regular file; empty if there is none. A link, pipe or device in its place reads as empty."""
    descriptor = _open_regular(path, os.O_RDONLY)
    if descriptor is None:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        file.seek(max(0, size - limit_bytes))
        return file.read(limit_bytes)


def trim_to_tail(path: Path, limit_bytes: int, *, keep_bytes: int) -> None:
    """Where the file is longer than ``limit_bytes`` keep its last ``keep_bytes`` only.

    For a file that another process goes on appending to (opened with O_APPEND): what it writes in the same moment may
    be lost, what it writes later follows the kept part.
    """
    descriptor = _open_regular(path, os.O_RDWR | os.O_APPEND)
    if descriptor is None:
        return
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        if size <= limit_bytes:
            return
        file.seek(size - keep_bytes)
        kept = file.read(keep_bytes)
        file.truncate(0)
        file.write(kept)


def _open_regular(path: Path, flags: int) -> int | None:
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return descriptor
