"""Looks at a database file before anything may change it: whether it is one, whole, ours, and not a newer Atelier's.

Called by ``engine`` at each start, and for what a backup holds. It opens the file read-only and never runs a
checkpoint, so a file that is refused here, and the log beside it, keep their bytes (SQLite may make ``-shm``, which
holds nothing).

``PRAGMA quick_check`` runs over the whole file. Measured with 1,000 sandboxes, their sagas and 100,000 events (16 MiB)
on two shared cores: 40 to 90 ms, 700 ms from a cold disk; the table of sandboxes alone would be 5 to 10 ms, but damage
elsewhere then shows in the middle of a saga. The size is bounded, as the outbox is trimmed. ``integrity_check`` costs
little more today and grows with indexes: it is for backups.
"""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from atelier.db.refusals import RESTORE_HINT, translate_error
from atelier.db.tables import SCHEMA_REVISION, metadata
from atelier.model.errors import HostError

_MAGIC = b"SQLite format 3\0"
_BUSY_TIMEOUT_SECONDS = 10.0
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Examined:
    """``revision``: the form of the tables, at most ours; ``installation_id`` is empty before the first start ended."""

    revision: str
    installation_id: str


def examine(path: Path, *, thorough: bool = False) -> Examined:
    """Raises HostError: ``database_damaged``, ``database_too_new``, ``database_unusable``, ``database_busy``."""
    _examine_file(path)
    try:
        with closing(connect_read_only(path)) as connection:
            found = connection.execute(f"PRAGMA {'integrity_check' if thorough else 'quick_check'}(1)").fetchone()
            if found is None or found[0] != "ok":
                said = str(found[0]) if found else "it cannot be checked"
                raise _damaged(path, said.splitlines()[-1][:_SHOWN_CHARACTERS])
            revision = _examine_tables(path, connection)
            installation_id = _find_installation_id(connection)
    except sqlite3.Error as error:
        raise translate_error(error) from error
    _examine_log(path, installation_id)
    return Examined(revision, installation_id)


def connect_read_only(path: Path, *, without_log: bool = False) -> sqlite3.Connection:
    """A connection that cannot write. ``without_log``: what the file itself says, whatever lies beside it."""
    options = "?mode=ro&immutable=1" if without_log else "?mode=ro"
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}{options}", uri=True, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None
    )


def _examine_file(path: Path) -> None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a file"
            raise HostError(
                f"{path} is {kind}, and the database should be there",
                code="database_unusable",
                hint="move it away; then start to begin a new database, or bring back a backup with `atelier restore`",
            )
        with path.open("rb") as file:
            head = file.read(len(_MAGIC))
    except OSError as error:
        raise HostError(
            f"cannot open the database {path}: {error.strerror}",
            code="database_unusable",
            hint="check the owner and permissions of ATELIER_DATA_DIR",
        ) from error
    if not head:
        # A new database gets its name when it is whole, so this one has lost its content.
        raise _damaged(path, "the file is empty")
    if head != _MAGIC:
        raise _damaged(path, "it is not an SQLite database")


def _examine_tables(path: Path, connection: sqlite3.Connection) -> str:
    columns: dict[str, set[str]] = {}
    query = "SELECT m.name, c.name FROM sqlite_master AS m, pragma_table_info(m.name) AS c WHERE m.type = 'table'"
    for table, column in connection.execute(query):
        columns.setdefault(table, set()).add(column)
    if "alembic_version" not in columns:
        if columns.keys() & metadata.tables.keys():
            raise _damaged(path, "the table alembic_version is missing")
        raise HostError(
            f"the database {path} holds tables that are not Atelier's"
            if columns
            else f"the database {path} is damaged: it holds no tables",
            code="database_damaged",
            hint=RESTORE_HINT,
        )
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    if row is None:
        raise _damaged(path, "its version is missing")
    revision = str(row[0])
    if revision > SCHEMA_REVISION:
        raise HostError(
            f"the database {path} was written by a newer Atelier (form {revision}, this one knows {SCHEMA_REVISION})",
            code="database_too_new",
            hint="install that version again, or bring back a backup from before the upgrade with `atelier restore FILE`",
        )
    if revision == SCHEMA_REVISION:
        for table in metadata.sorted_tables:
            missing = {column.name for column in table.columns} - columns.get(table.name, set())
            if table.name not in columns:
                raise _damaged(path, f"the table {table.name} is missing")
            if missing:
                raise _damaged(path, f"columns of the table {table.name} are missing: {', '.join(sorted(missing))}")
    return revision


def _examine_log(path: Path, installation_id: str) -> None:
    """A write-ahead log that was left beside another database is whole in itself, and SQLite would write it over this
    one. The two then name different installations."""
    log = Path(f"{path}-wal")
    if not log.exists() or log.stat().st_size == 0:
        return
    try:
        with closing(connect_read_only(path, without_log=True)) as connection:
            own = _find_installation_id(connection)
    except sqlite3.Error:
        # Half-way through a checkpoint the file alone makes no sense, and with its log it does.
        return
    if own and own != installation_id:
        raise HostError(
            f"the log {log} belongs to another database than {path}",
            code="database_damaged",
            hint=f"move {log.name} away; the database itself is kept as it is",
        )


def _find_installation_id(connection: sqlite3.Connection) -> str:
    row = connection.execute("SELECT value FROM settings WHERE name = 'installation_id'").fetchone()
    return str(row[0]) if row else ""


def _damaged(path: Path, what: str) -> HostError:
    return HostError(f"the database {path} is damaged: {what}", code="database_damaged", hint=RESTORE_HINT)
