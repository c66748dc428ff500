"""The errors of SQLite in our words, each with a remedy.

Used by every file of this room that touches a database. What SQLite calls an error is told by its extended code where
the module hands one over, not by the wording alone.
"""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from atelier.model.errors import DiskFullError, HostError

RESTORE_HINT = (
    "bring back a backup with `atelier restore FILE`, or move atelier.db (with atelier.db-wal and atelier.db-shm, if "
    "they are there) out of the data folder to begin a new database; disks stay in any case"
)


def translate_error(error: SQLAlchemyError | sqlite3.Error) -> HostError:
    """What SQLite said, as an error with a remedy."""
    original = error.orig if isinstance(error, DBAPIError) else error
    text = str(original)
    # Errors that the module raises by itself carry no name.
    name = str(getattr(original, "sqlite_errorname", ""))
    # Source: SQLite, "Result and Error Codes": ENOSPC is SQLITE_FULL, but for the shared memory beside the log.
    if "disk is full" in text or name in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"):
        return DiskFullError(
            f"the database could not be written, no space is left: {text}", hint="free space below ATELIER_DATA_DIR"
        )
    if "disk I/O error" in text:
        return HostError(
            f"the database could not be read or written: {text} ({name})",
            code="database_unusable",
            hint="see whether the disk below ATELIER_DATA_DIR is full or failing (the kernel's log tells)",
        )
    if "readonly" in text or "unable to open" in text:
        return HostError(
            f"the database cannot be used: {text}",
            code="database_unusable",
            hint="check the owner and permissions of ATELIER_DATA_DIR, and that its file system is not mounted read-only",
        )
    if "locked" in text:
        return HostError(
            f"the database stayed locked: {text}",
            code="database_busy",
            hint="end the other program that has atelier.db open",
        )
    if "not a database" in text or "malformed" in text:
        return HostError(f"the database is damaged: {text}", code="database_damaged", hint=RESTORE_HINT)
    return HostError(f"the database refused: {text}", code="database_error", hint="see the manager's log")
