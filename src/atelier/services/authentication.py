"""From a key or a session's token to who it is. Called by the gate, before every request.

What was found is remembered until anything about users, keys or sessions changes, so that a request costs one hash and
one look into a dictionary. A key or session that is revoked closes nothing that is open; its next request is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from atelier.db.credentials import CredentialRepository
from atelier.db.engine import Connection, Database
from atelier.model.errors import AuthenticationError
from atelier.model.principal import Principal

KEY_PREFIX = "atl_"
_E2B_KEY = re.compile(r"e2b_([0-9a-f]{40})")
"""The form that E2B's SDK insists on: the same key under another prefix. Source: e2b, connection_config."""
_USE_WRITTEN_EVERY = timedelta(minutes=1)
_REMEMBERED_AT_MOST = 10_000

_Found = tuple[Principal, datetime | None, bool]


def hash_secret(secret: str) -> str:
    """Enough for what is random and long: there is nothing to guess."""
    return hashlib.sha256(secret.encode()).hexdigest()


def secret_of_key(key: str) -> str:
    """What stands behind the prefix; of a key in no known form, the key itself."""
    if found := _E2B_KEY.fullmatch(key):
        return found[1]
    return key.removeprefix(KEY_PREFIX)


class Authenticator:
    """``forget`` is to be called after each write to users, keys and sessions."""

    def __init__(self, database: Database, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = database
        self._now = now
        self._credentials = CredentialRepository()
        self._known: dict[str, _Found] = {}
        self._used: dict[str, datetime] = {}
        self._writing: set[asyncio.Task[Any]] = set()

    def forget(self) -> None:
        self._known.clear()

    def by_key(self, key: str) -> Principal:
        """Raises AuthenticationError (``unauthenticated``, ``key_expired``, ``user_disabled``)."""
        principal = self._identify(f"key {hash_secret(secret_of_key(key))}", "key")
        self._note_use(principal.key_id)
        return principal

    def by_session(self, token: str) -> Principal:
        """Raises AuthenticationError (``unauthenticated``, ``session_expired``, ``user_disabled``)."""
        return self._identify(f"session {hash_secret(token)}", "session")

    def by_id(self, *, key_id: str = "", session_id: str = "") -> Principal:
        """Whoever came by this key or session, as long as that is good. Raises as the others."""
        return (
            self._identify(f"key-id {key_id}", "key")
            if key_id
            else self._identify(f"session-id {session_id}", "session")
        )

    def _identify(self, name: str, kind: str) -> Principal:
        found = self._known.get(name) or self._look_up(name)
        if found is None:
            if kind == "key":
                raise AuthenticationError("the key is wrong", hint="check ATELIER_API_KEY, or the local token file")
            raise AuthenticationError("this session is over", hint="sign in again, at /sign-in")
        principal, expires_at, is_disabled = found
        if is_disabled:
            raise AuthenticationError(
                f"the user {principal.name} is disabled", code="user_disabled", hint="an admin can enable them again"
            )
        if expires_at is not None and expires_at <= self._now():
            hint = "make another: atelier key create" if kind == "key" else "sign in again, at /sign-in"
            raise AuthenticationError(f"the {kind} has expired", code=f"{kind}_expired", hint=hint)
        return principal

    def _look_up(self, name: str) -> _Found | None:
        kind, _, value = name.partition(" ")
        find = {
            "key": self._credentials.find_by_key,
            "key-id": self._credentials.find_by_key_id,
            "session": self._credentials.find_by_session,
            "session-id": self._credentials.find_by_session_id,
        }[kind]
        with self._database.read() as connection:
            found = find(connection, value)
        if found is not None:
            if len(self._known) >= _REMEMBERED_AT_MOST:
                self._known.clear()
            self._known[name] = found
        return found

    def _note_use(self, key_id: str) -> None:
        now, last = self._now(), self._used.get(key_id)
        if last is not None and now - last < _USE_WRITTEN_EVERY:
            return
        self._used[key_id] = now

        def write(connection: Connection) -> None:
            self._credentials.set_last_used_at(connection, key_id, now)

        task = asyncio.ensure_future(self._database.write(write))
        self._writing.add(task)
        task.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[Any]) -> None:
        self._writing.discard(task)
        # That a use could not be written down is told by the next write that matters.
        if not task.cancelled():
            task.exception()

    async def close(self) -> None:
        await asyncio.gather(*self._writing, return_exceptions=True)
