"""The database file: opening, migrating, reading on the event loop, writing in one thread, waking subscribers.

Made by ``manager.wiring``; handed to ``lifecycle`` and ``services``. Reads cost tens of microseconds and run straight on
the loop; a write's fsync never does. Settings: WAL, ``synchronous=FULL``, ``foreign_keys``, ``BEGIN IMMEDIATE``.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from sqlalchemy import Connection, NullPool, create_engine
from sqlalchemy.exc import SQLAlchemyError

from atelier.db import schema
from atelier.db.examination import examine
from atelier.db.refusals import RESTORE_HINT, translate_error
from atelier.db.tables import SCHEMA_REVISION
from atelier.db.writer import Writer, signal
from atelier.host.files import disk_full, sync_folder
from atelier.model.errors import HostError

__all__ = ["Connection", "Database", "Subscription", "signal"]

_BUSY_TIMEOUT_SECONDS = 10.0
_T = TypeVar("_T")


class Subscription:
    """Wakes its one holder after commits that signalled the topic. Subscribe, then ``clear``, read and ``wait`` in
    turns: nothing can fall between."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def wake(self) -> None:
        self._event.set()

    def clear(self) -> None:
        """Forget what was signalled so far: the holder is about to read it all."""
        self._event.clear()

    async def wait(self) -> None:
        """Return when something was signalled since the last ``clear``."""
        await self._event.wait()


class Database:
    """One SQLite file, used by one process and one event loop. ``open`` first, ``close`` last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: Connection | None = None
        self._read_depth = 0
        self._writer = Writer(self._wake)
        self._subscriptions: dict[str, set[Subscription]] = {}

    def open(self) -> None:
        """Called on the event loop that will use it. Make the file (mode 0600), or bring it to this version's form, and
        start writing. A file that is refused keeps its bytes.

        Raises HostError: ``database_too_new``, ``database_damaged``, ``database_unusable``, ``database_busy``;
        DiskFullError.
        """
        try:
            if os.path.lexists(self.path):
                revision = examine(self.path).revision
            else:
                self._create()
                revision = SCHEMA_REVISION
            # Without this SQLite would take a file that it may only read, and say so at the first write.
            os.close(os.open(self.path, os.O_RDWR | os.O_CLOEXEC))
            connection = self._connect(self.path)
            try:
                # Also finds out now, and not at the first write, that another program holds the file.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                if revision < SCHEMA_REVISION:
                    schema.migrate(connection)
                connection.commit()
                connection.exec_driver_sql("PRAGMA query_only = ON")
                connection.rollback()
            except BaseException:
                connection.close()
                raise
        except OSError as error:
            raise self._unusable(error) from error
        except SQLAlchemyError as error:
            raise translate_error(error) from error
        self._reader = connection
        self._writer.start(self._connect(self.path, any_thread=True))

    def _create(self) -> None:
        """Under another name first: a database that has its name is whole, and an empty file is never ours."""
        log = Path(f"{self.path}-wal")
        if log.exists() and log.stat().st_size > 0:
            raise HostError(
                f"the database {self.path} is missing, but its log {log.name} is there",
                code="database_damaged",
                hint=RESTORE_HINT,
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.new")
        try:
            _remove_database(unfinished)
            os.close(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            connection = self._connect(unfinished)
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                schema.create(connection)
                connection.commit()
            finally:
                connection.close()
            unfinished.rename(self.path)
            sync_folder(self.path.parent)
        except BaseException:
            _remove_database(unfinished)
            raise

    def _unusable(self, error: OSError) -> HostError:
        doing = f"opening the database {self.path}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(doing)
        return HostError(
            f"cannot open the database {self.path}: {error.strerror}",
            code="database_unusable",
            hint="check the owner and permissions of ATELIER_DATA_DIR, and that its file system is not mounted read-only",
        )

    def close(self) -> None:
        """Finish pending writes (a moment) and let go of the file. Closing twice does nothing."""
        reader, self._reader = self._reader, None
        if reader is not None:
            self._writer.stop()
            reader.close()

    @contextmanager
    def read(self) -> Generator[Connection, None, None]:
        """A connection that sees one committed state of the database. Never ``await`` inside.

        Raises HostError for what SQLite refuses.
        """
        connection = self._reader
        if connection is None:
            raise HostError("the database is closed", code="database_unusable")
        try:
            if self._read_depth == 0:
                connection.exec_driver_sql("BEGIN")
            self._read_depth += 1
            try:
                yield connection
            finally:
                self._read_depth -= 1
                if self._read_depth == 0:
                    connection.rollback()
        except SQLAlchemyError as error:
            raise translate_error(error) from error

    async def write(self, function: Callable[[Connection], _T]) -> _T:
        """Run ``function`` in the writer's thread, inside a transaction of its own; return what it returns once that is
        on disk. What it raises rolls back its own work and is raised here. It may touch nothing but the connection.

        A caller that is cancelled may find later that the write was done.
        """
        if self._reader is None:
            raise HostError("the database is closed", code="database_unusable")
        return cast(_T, await self._writer.submit(function))

    @contextmanager
    def subscribe(self, topic: str) -> Generator[Subscription, None, None]:
        """Be woken after each commit that called ``signal(connection, topic)``."""
        subscription = Subscription()
        self._subscriptions.setdefault(topic, set()).add(subscription)
        try:
            yield subscription
        finally:
            subscriptions = self._subscriptions[topic]
            subscriptions.discard(subscription)
            if not subscriptions:
                del self._subscriptions[topic]

    def _wake(self, topics: set[str]) -> None:
        for topic in topics:
            for subscription in self._subscriptions.get(topic, ()):
                subscription.wake()

    def _connect(self, path: Path, *, any_thread: bool = False) -> Connection:
        def connect() -> sqlite3.Connection:
            # isolation_level None: transactions begin where we say, not where the module guesses.
            connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=not any_thread
            )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            return connection

        return create_engine("sqlite://", creator=connect, poolclass=NullPool).connect()


def _remove_database(path: Path) -> None:
    for ending in ("", "-wal", "-shm", "-journal"):
        Path(f"{path}{ending}").unlink(missing_ok=True)
