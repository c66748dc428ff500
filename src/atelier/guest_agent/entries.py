"""File system entries as clients see them, and the kernel's errors in words.

Called by the agent's file services. Paths are bytes throughout. Every function that touches the file system expects to
be inside ``credentials.acting_as``.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import stat
import time
from typing import Any, Final

from atelier.guest_agent.http import HttpError
from atelier.guest_agent.users import UserDirectory
from atelier.guest_protocol.connect import ConnectError

_METADATA_PREFIX: Final = "user.e2b."


# ENOTDIR stands on the way to a path that therefore does not exist. Source for the others: errno(3).
_CODES: Final = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EROFS: "permission_denied",
    errno.EEXIST: "already_exists",
    errno.ENOTEMPTY: "failed_precondition",
    errno.EISDIR: "invalid_argument",
    errno.ENAMETOOLONG: "invalid_argument",
    errno.EINVAL: "invalid_argument",
    errno.ELOOP: "invalid_argument",
    errno.EXDEV: "failed_precondition",
    errno.EBUSY: "failed_precondition",
    errno.ETXTBSY: "failed_precondition",
    errno.ENOTSUP: "unimplemented",
    errno.ENOSPC: "resource_exhausted",
    errno.EDQUOT: "resource_exhausted",
    errno.EMFILE: "resource_exhausted",
    errno.ENFILE: "resource_exhausted",
}


def show(path: bytes) -> str:
    """The path for people: what is no UTF-8 stands there as U+FFFD."""
    return path.decode("utf-8", "replace")


def is_text(path: bytes) -> bool:
    """Whether ``path`` is UTF-8, so that ``show`` loses nothing."""
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


def error_from(error: OSError, operation: str, path: bytes) -> ConnectError:
    """``operation`` is a verb: ``cannot <operation> <path>: <reason>``."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    code = _CODES.get(error.errno or 0, "internal")
    message = f"cannot {operation} {show(path)}: {reason.lower()}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HttpError(507, code, message)
    return ConnectError(code, message)


class errors_about:
    """``with errors_about("read", path):`` an OSError inside becomes a ConnectError in words."""

    __slots__ = ("_operation", "_path")

    def __init__(self, operation: str, path: bytes) -> None:
        self._operation = operation
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A client that went away (ConnectionError) says nothing of the file.
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            raise error_from(error, self._operation, self._path) from error


def _timestamp(time_ns: int) -> str:
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    try:
        moment = time.gmtime(seconds)
    except (OverflowError, OSError):
        moment, nanoseconds = time.gmtime(0), 0
    if not 1 <= moment.tm_year <= 9999:
        moment, nanoseconds = time.gmtime(0), 0
    return (
        f"{moment.tm_year:04}-{moment.tm_mon:02}-{moment.tm_mday:02}"
        f"T{moment.tm_hour:02}:{moment.tm_min:02}:{moment.tm_sec:02}.{nanoseconds:09}Z"
    )


def _file_type(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "FILE_TYPE_FILE"
    if stat.S_ISDIR(mode):
        return "FILE_TYPE_DIRECTORY"
    if stat.S_ISLNK(mode):
        return "FILE_TYPE_SYMLINK"
    return "FILE_TYPE_UNSPECIFIED"


def _metadata(path: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        for name in os.listxattr(path, follow_symlinks=False):
            if name.startswith(_METADATA_PREFIX):
                value = os.getxattr(path, name, follow_symlinks=False)
                found[name[len(_METADATA_PREFIX) :]] = value.decode("utf-8", "replace")
    except OSError:
        # No attributes on this file system, or the file went away: then it has none.
        return {}
    return found


def describe(path: bytes, users: UserDirectory) -> dict[str, Any]:
    """``filesystem.EntryInfo`` in its JSON form for ``path`` itself (a link is not followed); raises OSError.

    ``type`` of a link is its target's, with ``isSymlink``; of a broken one ``FILE_TYPE_SYMLINK``. ``pathBytes``
    (base64) is ours and there only when the path is no UTF-8. ``mode`` holds the bits 0o7777.
    """
    status = os.lstat(path)
    mode = status.st_mode
    entry: dict[str, Any] = {
        "name": show(os.path.basename(path)) or "/",
        "type": _file_type(mode),
        "path": show(path),
        "size": str(status.st_size),
        "mode": stat.S_IMODE(mode),
        "permissions": stat.filemode(mode),
        "owner": users.name_of(status.st_uid),
        "group": users.group_name_of(status.st_gid),
        "modifiedTime": _timestamp(status.st_mtime_ns),
    }
    if not is_text(path):
        entry["pathBytes"] = base64.b64encode(path).decode()
    if stat.S_ISLNK(mode):
        entry["isSymlink"] = True
        entry["symlinkTarget"] = show(os.readlink(path))
        with contextlib.suppress(OSError):
            entry["type"] = _file_type(os.stat(path).st_mode)
    elif metadata := _metadata(path):
        entry["metadata"] = metadata
    return entry


def set_metadata(descriptor: int, metadata: dict[str, str]) -> None:
    """Keep ``metadata`` as extended attributes ``user.e2b.*`` of an open file; raises OSError."""
    for key, value in metadata.items():
        os.setxattr(descriptor, _METADATA_PREFIX + key, value.encode())


def make_parents(path: bytes, mode: int = 0o755) -> None:
    """Make the folder ``path`` and what is missing above it, as ``mkdir -p``; raises OSError."""
    missing: list[bytes] = []
    while True:
        try:
            os.mkdir(path, mode)
            break
        except FileExistsError:
            if not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            break
        except FileNotFoundError:
            parent = os.path.dirname(path)
            if parent == path:
                raise
            missing.append(path)
            path = parent
    for folder in reversed(missing):
        try:
            os.mkdir(folder, mode)
        except FileExistsError:
            continue
