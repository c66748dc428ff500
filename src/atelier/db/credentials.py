"""The tables of API keys and browser sessions. Only hashes of secrets are kept. Called by ``services``."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, select, update

from atelier.db.tables import api_keys, browser_sessions, users
from atelier.model.principal import ALL_SCOPES, ApiKey, BrowserSession, Principal, Role, Scope

_HOLDER = (users.c.name.label("user_name"), users.c.role, users.c.is_disabled)


class CredentialRepository:
    """Stateless: everything stands in the tables. All methods work in the caller's transaction."""

    # --- who it is ----------------------------------------------------------------------------------------------------

    def find_by_key(self, connection: Connection, key_hash: str) -> tuple[Principal, datetime | None, bool] | None:
        """(who, when the key expires, whether the user is disabled)."""
        return self._holder_of_key(connection, api_keys.c.hash == key_hash)

    def find_by_key_id(self, connection: Connection, key_id: str) -> tuple[Principal, datetime | None, bool] | None:
        """The same."""
        return self._holder_of_key(connection, api_keys.c.id == key_id)

    def _holder_of_key(
        self, connection: Connection, condition: ColumnElement[bool]
    ) -> tuple[Principal, datetime | None, bool] | None:
        query = select(api_keys, *_HOLDER).join(users, users.c.id == api_keys.c.user_id)
        row = connection.execute(query.where(condition)).one_or_none()
        if row is None:
            return None
        scopes = frozenset(Scope(each) for each in row.scopes)
        who = Principal(row.user_id, row.user_name, Role(row.role), scopes, key_id=row.id)
        return who, row.expires_at, row.is_disabled

    def find_by_session(
        self, connection: Connection, token_hash: str
    ) -> tuple[Principal, datetime | None, bool] | None:
        """(who, when the session expires, whether the user is disabled)."""
        return self._holder_of_session(connection, browser_sessions.c.hash == token_hash)

    def find_by_session_id(
        self, connection: Connection, session_id: str
    ) -> tuple[Principal, datetime | None, bool] | None:
        """The same."""
        return self._holder_of_session(connection, browser_sessions.c.id == session_id)

    def _holder_of_session(
        self, connection: Connection, condition: ColumnElement[bool]
    ) -> tuple[Principal, datetime | None, bool] | None:
        query = select(browser_sessions, *_HOLDER).join(users, users.c.id == browser_sessions.c.user_id)
        row = connection.execute(query.where(condition)).one_or_none()
        if row is None:
            return None
        who = Principal(row.user_id, row.user_name, Role(row.role), ALL_SCOPES, session_id=row.id)
        return who, row.expires_at, row.is_disabled

    # --- keys ---------------------------------------------------------------------------------------------------------

    def insert_key(self, connection: Connection, key: ApiKey, key_hash: str) -> None:
        values = {
            "id": key.id,
            "user_id": key.user_id,
            "name": key.name,
            "hash": key_hash,
            "hint": key.hint,
            "scopes": sorted(key.scopes),
            "is_local": key.is_local,
            "created_at": key.created_at,
            "expires_at": key.expires_at,
        }
        connection.execute(insert(api_keys), values)

    def list_keys(self, connection: Connection, user_id: str | None) -> list[ApiKey]:
        """Oldest first; ``user_id`` None: everybody's."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if user_id is not None:
            query = query.where(api_keys.c.user_id == user_id)
        return [_to_key(row) for row in connection.execute(query)]

    def find_key(self, connection: Connection, key_id: str) -> ApiKey | None:
        row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        return None if row is None else _to_key(row)

    def find_local_hash(self, connection: Connection) -> str | None:
        return connection.execute(select(api_keys.c.hash).where(api_keys.c.is_local)).scalar_one_or_none()

    def delete_local_key(self, connection: Connection) -> None:
        connection.execute(delete(api_keys).where(api_keys.c.is_local))

    def delete_key(self, connection: Connection, key_id: str) -> None:
        connection.execute(delete(api_keys).where(api_keys.c.id == key_id))

    def set_last_used_at(self, connection: Connection, key_id: str, at: datetime) -> None:
        connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=at))

    # --- sessions -----------------------------------------------------------------------------------------------------

    def insert_session(self, connection: Connection, session: BrowserSession, token_hash: str) -> None:
        values = {
            "id": session.id,
            "user_id": session.user_id,
            "hash": token_hash,
            "provider": session.provider,
            "address": session.address,
            "created_at": session.created_at,
            "expires_at": session.expires_at,
        }
        connection.execute(insert(browser_sessions), values)

    def list_sessions(self, connection: Connection, user_id: str | None) -> list[BrowserSession]:
        """Oldest first; ``user_id`` None: everybody's."""
        query = select(browser_sessions).order_by(browser_sessions.c.created_at, browser_sessions.c.id)
        if user_id is not None:
            query = query.where(browser_sessions.c.user_id == user_id)
        return [_to_session(row) for row in connection.execute(query)]

    def find_session(self, connection: Connection, session_id: str) -> BrowserSession | None:
        row = connection.execute(select(browser_sessions).where(browser_sessions.c.id == session_id)).one_or_none()
        return None if row is None else _to_session(row)

    def delete_session(self, connection: Connection, session_id: str) -> None:
        connection.execute(delete(browser_sessions).where(browser_sessions.c.id == session_id))

    def delete_sessions_of(self, connection: Connection, user_id: str) -> None:
        connection.execute(delete(browser_sessions).where(browser_sessions.c.user_id == user_id))

    def trim_sessions(self, connection: Connection, now: datetime) -> None:
        """Forget those that have expired."""
        connection.execute(delete(browser_sessions).where(browser_sessions.c.expires_at <= now))


def _to_key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        id=row.id,
        user_id=row.user_id,
        name=row.name,
        hint=row.hint,
        scopes=frozenset(Scope(each) for each in row.scopes),
        is_local=row.is_local,
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
    )


def _to_session(row: Row[Any]) -> BrowserSession:
    return BrowserSession(row.id, row.user_id, row.provider, row.address, row.created_at, row.expires_at)
