"""Database files as they lie on disk, served by a manager or not: copying one, reading one, preparing a copy to be served.

Called by the manager's backup, restore and doctor. Works on SQLite's own module, with the few columns that every form of the
tables has had, so that a backup of an older version is read without being migrated first.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from atelier.db.examination import connect_read_only
from atelier.db.refusals import translate_error
from atelier.model.errors import HostError
from atelier.model.states import SandboxState

_RESTORED = "installation.restored"
_ID_LEAP = 1_000_000
"""More events than are ever given out between a backup and its restore; ids have room for many millions of restores."""


@dataclass(frozen=True, slots=True)
class StoredSandbox:
    id: str
    name: str
    state: SandboxState


@dataclass(frozen=True, slots=True)
class StuckSandbox:
    """``message`` says what does not go on, ``hint`` what a person can do about it."""

    name: str
    message: str
    hint: str


def copy_database(source: Path, destination: Path) -> None:
    """Write the state of ``source`` at one moment, its log included, into the new file ``destination``. The source is
    only read, and may be in use. Raises HostError for what SQLite refuses."""
    try:
        with closing(connect_read_only(source)) as connection:
            connection.execute("VACUUM INTO ?", (str(destination),))
    except sqlite3.Error as error:
        raise translate_error(error) from error


def read_installation_id(path: Path) -> str | None:
    """None where there is no database yet, or one that no manager has opened to its end."""
    if not path.exists():
        return None
    try:
        with closing(connect_read_only(path)) as connection:
            row = connection.execute("SELECT value FROM settings WHERE name = 'installation_id'").fetchone()
    except sqlite3.OperationalError:
        return None
    except sqlite3.Error as error:
        raise translate_error(error) from error
    return None if row is None else str(row[0])


def read_sandboxes(path: Path) -> list[StoredSandbox]:
    """All sandboxes of a database that is whole, in the order of their making."""
    try:
        with closing(connect_read_only(path)) as connection:
            rows = connection.execute("SELECT id, name, state FROM sandboxes ORDER BY sequence").fetchall()
    except sqlite3.Error as error:
        raise translate_error(error) from error
    return [StoredSandbox(str(row[0]), str(row[1]), SandboxState(row[2])) for row in rows]


def read_stuck_sandboxes(path: Path) -> list[StuckSandbox]:
    """The sandboxes with which something is stuck, oldest first."""
    query = (
        "SELECT name, failure_message, failure_hint FROM sandboxes "
        "WHERE failure_code LIKE '%\\_stuck' ESCAPE '\\' ORDER BY sequence"
    )
    try:
        with closing(connect_read_only(path)) as connection:
            return [StuckSandbox(*row) for row in connection.execute(query)]
    except sqlite3.Error as error:
        raise translate_error(error) from error


def find_newest_event_id(path: Path) -> int:
    """The last event id that this database gave out; 0 where it cannot be read."""
    try:
        with closing(connect_read_only(path)) as connection:
            row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
    except sqlite3.Error:
        return 0
    return int(row[0]) if row else 0


def mark_restored(path: Path, *, beyond_event_id: int, backup_made_at: str) -> None:
    """Append the event ``installation.restored``, whose id is larger than any that was given out before: by this
    database (also after the backup was made) or by the one that it replaces (``beyond_event_id``). A client that
    resumes so learns that time went back, and never meets another event under an id that it knows."""
    event_id = max(find_newest_event_id(path), beyond_event_id) + _ID_LEAP
    at = datetime.now(UTC).isoformat(timespec="microseconds")
    payload = json.dumps({"backup_made_at": backup_made_at})
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            # One file, with no log beside it: it is about to be renamed.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(
                "INSERT INTO outbox (id, at, kind, payload) VALUES (?, ?, ?, ?)", (event_id, at, _RESTORED, payload)
            )
    except sqlite3.Error as error:
        raise translate_error(error) from error


def fold_log_in(path: Path) -> None:
    """Bring the log beside a database into it, and remove the log. For a database that is whole (see ``examine``).

    Raises HostError (``database_busy``) when another program has it open.
    """
    try:
        with closing(sqlite3.connect(path, timeout=1.0, isolation_level=None)) as connection:
            mode = connection.execute("PRAGMA journal_mode = DELETE").fetchone()
    except sqlite3.Error as error:
        raise translate_error(error) from error
    if mode != ("delete",):
        raise HostError(
            f"another program has the database {path} open", code="database_busy", hint="end that program first"
        )
