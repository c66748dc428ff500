"""The one thread that writes.

Used by ``engine``. Functions that wait while a commit is on its way to the disk share the next one (group commit): each
still stands or falls alone, by a savepoint, and none is told that it succeeded before the shared commit is durable.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from atelier.db.refusals import translate_error

_logger = logging.getLogger(__name__)

_BATCH_LIMIT = 64
_TOPICS = "atelier_topics"


def signal(connection: Connection, topic: str) -> None:
    """Once this transaction is on disk, wake those who are subscribed to ``topic``."""
    connection.info.setdefault(_TOPICS, set()).add(topic)


@dataclass(slots=True)
class _Job:
    function: Callable[[Connection], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class Writer:
    """Runs functions on a connection of its own. ``on_topics`` is called on the event loop after each commit that
    signalled something. One event loop only: the one that ``start`` was called from."""

    def __init__(self, on_topics: Callable[[set[str]], None]) -> None:
        self._on_topics = on_topics
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self, connection: Connection) -> None:
        """``connection`` belongs to the writer's thread from here on, which closes it in the end."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, args=(connection,), name="database writer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish what was submitted, then end the thread."""
        assert self._thread is not None
        self._queue.put(None)
        self._thread.join()

    async def submit(self, function: Callable[[Connection], Any]) -> Any:
        assert self._loop is not None
        job = _Job(function, self._loop.create_future())
        self._queue.put(job)
        return await job.future

    def _serve(self, connection: Connection) -> None:
        ending = False
        while not ending:
            batch: list[_Job] = []
            waiting = self._queue.get()
            try:
                while waiting is not None and len(batch) < _BATCH_LIMIT:
                    batch.append(waiting)
                    waiting = self._queue.get_nowait()
                if waiting is not None:
                    batch.append(waiting)
                ending = waiting is None
            except queue.Empty:
                pass
            if batch:
                self._run(connection, batch)
        connection.close()

    def _run(self, connection: Connection, batch: list[_Job]) -> None:
        topics: set[str] = set()
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            for job in batch:
                topics |= self._run_one(connection, job, alone=len(batch) == 1)
            connection.commit()
        except BaseException as error:
            for job in batch:
                job.error = job.error or error
            topics = set()
            try:
                connection.rollback()
            except SQLAlchemyError:
                _logger.exception("the transaction could not be rolled back")
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._settle, batch, topics)
        except RuntimeError:
            _logger.warning("the event loop ended before %d writes could be answered", len(batch))

    def _run_one(self, connection: Connection, job: _Job, *, alone: bool) -> set[str]:
        """Run one function; returns the topics it signalled. Its own errors undo its own work only."""
        if job.future.cancelled():
            return set()
        topics: set[str] = set()
        connection.info[_TOPICS] = topics
        savepoint = None if alone else connection.begin_nested()
        try:
            job.result = job.function(connection)
        except Exception as error:
            if savepoint is None:
                raise
            try:
                savepoint.rollback()
            except SQLAlchemyError:
                # SQLite has rolled back everything by itself, as it does for a full disk: nobody's work is kept.
                raise error from None
            job.error = error
            return set()
        if savepoint is not None:
            savepoint.commit()
        return topics

    def _settle(self, batch: list[_Job], topics: set[str]) -> None:
        for job in batch:
            if job.future.done():
                continue
            if job.error is None:
                job.future.set_result(job.result)
            elif isinstance(job.error, SQLAlchemyError):
                error = translate_error(job.error)
                error.__cause__ = job.error
                job.future.set_exception(error)
            else:
                job.future.set_exception(job.error)
        if topics:
            self._on_topics(topics)
