"""Progress of long work as events of a sandbox, few enough for a database. Used by the sagas' steps.

Reports may come from any thread and many times a second; an event is written when the phase changes, and at most once a
second within one.
"""

from __future__ import annotations

import asyncio
import logging
import time

from atelier.db.engine import Connection, Database
from atelier.db.outbox import Outbox
from atelier.model.errors import AtelierError
from atelier.model.image import BuildProgress

PROGRESS = "sandbox.progress"
_PAUSE_SECONDS = 1.0
_logger = logging.getLogger(__name__)


class ProgressEvents:
    """``report`` is a ProgressReporter; ``finish`` returns when all that was reported is written."""

    def __init__(self, database: Database, outbox: Outbox, sandbox_id: str) -> None:
        self._database = database
        self._outbox = outbox
        self._sandbox_id = sandbox_id
        self._loop = asyncio.get_running_loop()
        self._phase = ""
        self._written_at = 0.0
        self._writes: set[asyncio.Task[None]] = set()

    def report(self, progress: BuildProgress) -> None:
        self._loop.call_soon_threadsafe(self._take, progress)

    async def finish(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes)

    def _take(self, progress: BuildProgress) -> None:
        now = time.monotonic()
        if progress.phase == self._phase and now - self._written_at < _PAUSE_SECONDS:
            return
        self._phase = progress.phase
        self._written_at = now
        task = asyncio.create_task(self._write(progress))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, progress: BuildProgress) -> None:
        payload = {"phase": progress.phase, "message": progress.message, "fraction": progress.fraction}

        def append(connection: Connection) -> None:
            self._outbox.append(connection, PROGRESS, self._sandbox_id, payload)

        try:
            await self._database.write(append)
        except AtelierError as error:
            _logger.warning("progress could not be written: %s", error)
