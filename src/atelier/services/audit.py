"""The audit log: who did what, when, from where. Written behind the answers, in batches, so that none waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from atelier.db.audit import AuditRepository
from atelier.db.engine import Connection, Database
from atelier.model.errors import AtelierError
from atelier.model.principal import AuditEntry, Principal

logger = logging.getLogger(__name__)

_KEPT_FOR = timedelta(days=90)
_GATHERING_SECONDS = 0.2
"""What comes within this time is one write. A manager that is killed loses so much of the log."""
_SUBJECT_MAX_LENGTH = 200


class AuditLog:
    def __init__(self, database: Database, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = database
        self._now = now
        self._entries = AuditRepository()
        self._waiting: list[AuditEntry] = []
        self._writing: asyncio.Task[None] | None = None

    def note(
        self, principal: Principal | None, operation: str, subject: str, status: int, address: str, *, through: str = ""
    ) -> None:
        """``principal`` None: somebody who is not known. ``through``: where neither a key nor a session says it."""
        if principal is not None and not through:
            through = f"key {principal.key_id}" if principal.key_id else f"session {principal.session_id}"
        self._waiting.append(
            AuditEntry(
                id=0,
                at=self._now(),
                user_id=principal.user_id if principal else "",
                user_name=principal.name if principal else "",
                through=through,
                operation=operation,
                subject=subject[:_SUBJECT_MAX_LENGTH],
                status=status,
                address=address,
            )
        )
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_soon())

    async def list_page(self, limit: int, before: int | None, user_id: str, operation: str) -> list[AuditEntry]:
        """Newest first, with ids below ``before``; what has been noted so far is among them."""
        await self._flush()
        with self._database.read() as connection:
            return self._entries.list_page(connection, limit, before, user_id, operation)

    async def trim(self) -> None:
        """Forget what is older than 90 days. The body of a background loop."""
        before = self._now() - _KEPT_FOR
        await self._database.write(lambda connection: self._entries.trim(connection, before))

    async def close(self) -> None:
        """Write what waits."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        with contextlib.suppress(AtelierError):
            await self._flush()

    async def _write_soon(self) -> None:
        await asyncio.sleep(_GATHERING_SECONDS)
        self._writing = None
        try:
            await self._flush()
        except AtelierError as error:
            logger.error("the audit log could not be written: %s", error)

    async def _flush(self) -> None:
        entries, self._waiting = self._waiting, []
        if not entries:
            return

        def write(connection: Connection) -> None:
            self._entries.append(connection, entries)

        await self._database.write(write)
