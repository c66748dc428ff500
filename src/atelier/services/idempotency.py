"""Requests that are sent twice and done once: the same key with the same request has the same outcome, for 24 hours.

Called by the routes that make something. A request that failed is not remembered: it may be tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from atelier.db.audit import IdempotencyRepository
from atelier.db.engine import Connection, Database
from atelier.model.errors import ConflictError, InvalidRequestError

_KEPT_FOR = timedelta(hours=24)


class IdempotencyService:
    def __init__(self, database: Database, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = database
        self._now = now
        self._requests = IdempotencyRepository()
        self._under_way: dict[tuple[str, str], asyncio.Task[list[str]]] = {}

    async def once(self, user_id: str, key: str, request: str, make: Callable[[], Awaitable[list[str]]]) -> list[str]:
        """Ids of what ``make`` made, now or when ``key`` was sent first. ``request``: all that must be the same. Who
        sends it while it is under way waits for its end; it goes on when its sender goes away.

        Raises InvalidRequestError (``idempotency_key_reused``), ConflictError (``idempotency_outcome_unknown``), and
        what ``make`` raises.
        """
        request_hash = hashlib.sha256(request.encode()).hexdigest()
        place = (user_id, key)
        with self._database.read() as connection:
            known = self._requests.find(connection, user_id, key)
        running = self._under_way.get(place)
        if running is None and known is None:
            running = asyncio.create_task(self._make(place, request_hash, make))
            self._under_way[place] = running
            running.add_done_callback(lambda task: self._ended(place, task))
            return await asyncio.shield(running)
        if known is None:
            # Its first sender has begun it in this moment, and its row is about to be written.
            await asyncio.wait({running}) if running is not None else None
            return await self.once(user_id, key, request, make)
        if known.request_hash != request_hash:
            raise InvalidRequestError(
                f"the Idempotency-Key {key!r} was sent with another request",
                code="idempotency_key_reused",
                hint="send a new key with each new request, and the old one only to repeat the old request",
            )
        if known.made is not None:
            return known.made
        if running is not None:
            return await asyncio.shield(running)
        raise ConflictError(
            f"the request with the Idempotency-Key {key!r} was cut off by the manager's end",
            code="idempotency_outcome_unknown",
            hint="look whether it was done (atelier ls); then send what is still wanted with a new key",
        )

    async def trim(self) -> None:
        """The body of a background loop."""
        before = self._now() - _KEPT_FOR
        await self._database.write(lambda connection: self._requests.trim(connection, before))

    async def _make(
        self, place: tuple[str, str], request_hash: str, make: Callable[[], Awaitable[list[str]]]
    ) -> list[str]:
        def begin(connection: Connection) -> None:
            self._requests.insert(connection, *place, request_hash, self._now())

        await self._database.write(begin)
        try:
            made = await make()
        except BaseException:
            await self._database.write(lambda connection: self._requests.delete(connection, *place))
            raise
        await self._database.write(lambda connection: self._requests.set_made(connection, *place, made))
        return made

    def _ended(self, place: tuple[str, str], task: asyncio.Task[list[str]]) -> None:
        self._under_way.pop(place, None)
        if not task.cancelled():
            task.exception()
