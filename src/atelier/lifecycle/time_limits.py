"""Stops sandboxes that nobody uses and destroys those whose time is over. The body of a background loop.

It asks ``sandboxes`` to do so, as a person would: a sandbox that somebody works on at that very moment by another
operation is left for the next round.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from atelier.db.engine import Connection, Database
from atelier.db.sandboxes import SandboxRepository
from atelier.lifecycle.activity import Activity
from atelier.model.errors import AtelierError
from atelier.model.sandbox import Sandbox
from atelier.model.states import SandboxState

_logger = logging.getLogger(__name__)

_WRITE_DOWN_AFTER = timedelta(seconds=60)


class TimeLimits:
    """``stop`` and ``destroy`` begin to, and return."""

    def __init__(
        self,
        database: Database,
        activity: Activity,
        now: Callable[[], datetime],
        *,
        stop: Callable[[str], Awaitable[object]],
        destroy: Callable[[str], Awaitable[object]],
    ) -> None:
        self._database = database
        self._sandboxes = SandboxRepository()
        self._activity = activity
        self._now = now
        self._stop = stop
        self._destroy = destroy

    async def enforce(self) -> None:
        with self._database.read() as connection:
            limited = self._sandboxes.list_limited(connection)
        now = self._now()
        for sandbox in limited:
            try:
                await self._enforce_on(sandbox, now)
            except AtelierError as error:
                _logger.warning("the time limit of sandbox %s waits: %s", sandbox.name, error)

    async def _enforce_on(self, sandbox: Sandbox, now: datetime) -> None:
        if sandbox.spec.expires_at is not None and sandbox.spec.expires_at <= now:
            if sandbox.state is not SandboxState.DESTROYING:
                _logger.info("sandbox %s has expired and is destroyed", sandbox.name)
                await self._destroy(sandbox.id)
            return
        idle_seconds = sandbox.spec.auto_stop_after_idle_seconds
        if idle_seconds is None or sandbox.state is not SandboxState.RUNNING:
            return
        last = self._activity.last_active_at(sandbox.id, sandbox.last_active_at)
        if now - last >= timedelta(seconds=idle_seconds):
            _logger.info("sandbox %s was idle for %d s and is stopped", sandbox.name, idle_seconds)
            await self._stop(sandbox.id)
        elif sandbox.last_active_at is None or last - sandbox.last_active_at >= _WRITE_DOWN_AFTER:
            await self._write_down(sandbox.id, last)

    async def _write_down(self, sandbox_id: str, last: datetime) -> None:
        def write(connection: Connection) -> None:
            self._sandboxes.set_last_active_at(connection, sandbox_id, last)

        await self._database.write(write)
