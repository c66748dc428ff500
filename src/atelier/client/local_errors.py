"""Says in words what this machine's file system refused. Called by the folder writer and reader and by downloads."""

from __future__ import annotations

import errno

from atelier.model.errors import AtelierError, DiskFullError, HostError

_SHOWN_AT_MOST_BYTES = 4096


def shown_name(name: bytes) -> str:
    """A file name on one line, with no character that a terminal would obey."""
    text = name[:_SHOWN_AT_MOST_BYTES].decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)


def local_error(name: bytes, verb: str, error: OSError) -> AtelierError:
    """The error for a failed attempt to ``verb`` (read, write) the local file ``name``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"could not {verb} {shown_name(name)}: no space is left on this machine",
            hint="free some space, then copy again",
        )
    return HostError(
        f"could not {verb} {shown_name(name)}: {error.strerror or error}",
        code="local_file_error",
        hint="check the local path",
    )
