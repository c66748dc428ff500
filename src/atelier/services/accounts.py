"""Users, their API keys and their browser sessions: make, list, change, revoke. Called by the routes and by sign-in."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from atelier.db.credentials import CredentialRepository
from atelier.db.engine import Connection, Database
from atelier.db.sandbox_access import SandboxAccessRepository
from atelier.db.users import UserRepository
from atelier.model.errors import AccessDeniedError, ConflictError, InvalidRequestError, NotFoundError
from atelier.model.ids import new_sandbox_id
from atelier.model.principal import (
    ALL_SCOPES,
    ApiKey,
    BrowserSession,
    Principal,
    Role,
    Scope,
    User,
    validate_email,
)
from atelier.services.authentication import KEY_PREFIX, Authenticator, hash_secret, secret_of_key

_T = TypeVar("_T")

_SESSION_LIFETIME = timedelta(days=14)
_HINT_LENGTH = 4


def new_key() -> str:
    """160 random bits, in a form that fits behind E2B's prefix too."""
    return KEY_PREFIX + secrets.token_hex(20)


class AccountService:
    def __init__(
        self,
        database: Database,
        authenticator: Authenticator,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._authenticator = authenticator
        self._now = now
        self._users = UserRepository()
        self._credentials = CredentialRepository()

    async def ensure_local_admin(self, token: str) -> User:
        """The first admin, whose key is the one in the local token file; what was made before there were users is
        theirs."""
        key_hash = hash_secret(secret_of_key(token))

        def ensure(connection: Connection) -> User:
            admin = self._users.find_local(connection)
            if admin is None:
                admin = User(new_sandbox_id(), "local admin", "", Role.ADMIN, False, True, self._now())
                self._users.insert(connection, admin)
                SandboxAccessRepository().adopt(connection, admin.id)
            if self._credentials.find_local_hash(connection) != key_hash:
                self._credentials.delete_local_key(connection)
                key = self._new_key_row(admin.id, "local token file", token, ALL_SCOPES, None)
                self._credentials.insert_key(connection, replace(key, is_local=True), key_hash)
            return admin

        return await self._changing(ensure)

    # --- users --------------------------------------------------------------------------------------------------------

    def get_user(self, reference: str) -> User:
        """By id or e-mail address. Raises NotFoundError (``user_not_found``)."""
        with self._database.read() as connection:
            return self._users.get(connection, reference)

    def list_users(self) -> list[User]:
        with self._database.read() as connection:
            return self._users.list_all(connection)

    async def add_user(self, email: str, name: str, role: Role) -> User:
        """Somebody who may sign in from now on, at any provider that vouches for the address.

        Raises InvalidRequestError (``invalid_email``), ConflictError (``email_taken``).
        """
        address = validate_email(email)
        user = User(new_sandbox_id(), name or address, address, role, False, False, self._now())
        await self._changing(lambda connection: self._users.insert(connection, user))
        return user

    async def change_user(self, reference: str, role: Role | None, is_disabled: bool | None, name: str | None) -> User:
        """None: as it is. A disabled user's sessions end; keys and sandboxes stay, and work again with the user.

        Raises NotFoundError, ConflictError (``last_admin``).
        """

        def change(connection: Connection) -> User:
            user = self._users.get(connection, reference)
            changed = replace(
                user,
                role=user.role if role is None else role,
                is_disabled=user.is_disabled if is_disabled is None else is_disabled,
                name=user.name if name is None else name,
            )
            if user.is_local and (changed.role is not Role.ADMIN or changed.is_disabled):
                raise ConflictError(
                    "the local admin stays an admin: the token file on the manager's machine is theirs",
                    code="last_admin",
                    hint="who may read that file may do everything; keep it closed",
                )
            self._users.change(
                connection, user.id, role=changed.role, is_disabled=changed.is_disabled, name=changed.name
            )
            if changed.is_disabled:
                self._credentials.delete_sessions_of(connection, user.id)
            return changed

        return await self._changing(change)

    # --- keys ---------------------------------------------------------------------------------------------------------

    def list_keys(self, principal: Principal, *, everybodys: bool) -> list[ApiKey]:
        """Raises AccessDeniedError when somebody else than an admin asks for everybody's."""
        with self._database.read() as connection:
            return self._credentials.list_keys(connection, _whose(principal, everybodys))

    async def create_key(
        self,
        principal: Principal,
        name: str,
        scopes: frozenset[Scope],
        expires_at: datetime | None,
        *,
        user: str | None = None,
    ) -> tuple[ApiKey, str]:
        """The key's row and the key, which nobody can be shown again. ``user``: whose it is to be, if not the
        principal's own.

        Raises InvalidRequestError (``expiry_in_past``), AccessDeniedError (``scope_missing``, ``admin_only``),
        NotFoundError (``user_not_found``).
        """
        if user is not None and not principal.is_admin:
            raise AccessDeniedError("only admins make keys for others", code="admin_only", hint="leave the user out")
        user_id = principal.user_id if user is None else self.get_user(user).id
        if expires_at is not None and expires_at <= self._now():
            raise InvalidRequestError(
                "the key would have expired already", code="expiry_in_past", hint="give a later time"
            )
        if not scopes <= principal.scopes:
            raise AccessDeniedError(
                f"a key cannot make one that may do more: {', '.join(sorted(scopes - principal.scopes))}",
                code="scope_missing",
                hint="use a key that has these scopes, or sign in",
            )
        key = new_key()
        row = self._new_key_row(user_id, name, key, scopes, expires_at)
        await self._changing(
            lambda connection: self._credentials.insert_key(connection, row, hash_secret(secret_of_key(key)))
        )
        return row, key

    async def revoke_key(self, principal: Principal, key_id: str) -> None:
        """The user's own; an admin any. Raises NotFoundError (``key_not_found``), ConflictError (``local_key``)."""

        def revoke(connection: Connection) -> None:
            key = self._credentials.find_key(connection, key_id)
            if key is None or (principal.viewer_id is not None and key.user_id != principal.viewer_id):
                raise NotFoundError(
                    f"there is no key {key_id!r}", code="key_not_found", hint="atelier key ls shows yours"
                )
            if key.is_local:
                raise ConflictError(
                    "the local key stands in token.json in the manager's data folder",
                    code="local_key",
                    hint="to replace it, remove that file and start the manager again",
                )
            self._credentials.delete_key(connection, key_id)

        await self._changing(revoke)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def list_sessions(self, principal: Principal, *, everybodys: bool) -> list[BrowserSession]:
        """Raises AccessDeniedError when somebody else than an admin asks for everybody's."""
        with self._database.read() as connection:
            return self._credentials.list_sessions(connection, _whose(principal, everybodys))

    async def open_session(self, user_id: str, provider: str, address: str) -> tuple[BrowserSession, str]:
        """The session's row and its token."""
        token = secrets.token_urlsafe(32)
        now = self._now()
        session = BrowserSession(new_sandbox_id(), user_id, provider, address, now, now + _SESSION_LIFETIME)
        await self._changing(
            lambda connection: self._credentials.insert_session(connection, session, hash_secret(token))
        )
        return session, token

    async def revoke_session(self, principal: Principal, session_id: str) -> None:
        """The user's own; an admin any. Raises NotFoundError (``session_not_found``)."""

        def revoke(connection: Connection) -> None:
            session = self._credentials.find_session(connection, session_id)
            if session is None or (principal.viewer_id is not None and session.user_id != principal.viewer_id):
                raise NotFoundError(f"there is no session {session_id!r}", code="session_not_found")
            self._credentials.delete_session(connection, session_id)

        await self._changing(revoke)

    async def trim(self) -> None:
        """Forget what has run out. The body of a background loop."""

        def trim(connection: Connection) -> None:
            self._credentials.trim_sessions(connection, self._now())
            SandboxAccessRepository().trim_shares(connection)

        await self._changing(trim)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _new_key_row(
        self, user_id: str, name: str, key: str, scopes: frozenset[Scope], expires_at: datetime | None
    ) -> ApiKey:
        return ApiKey(
            new_sandbox_id(), user_id, name, key[-_HINT_LENGTH:], scopes, False, self._now(), expires_at=expires_at
        )

    async def _changing(self, function: Callable[[Connection], _T]) -> _T:
        try:
            return await self._database.write(function)
        finally:
            self._authenticator.forget()


def _whose(principal: Principal, everybodys: bool) -> str | None:
    if not everybodys:
        return principal.user_id
    if principal.viewer_id is not None:
        raise AccessDeniedError("only admins see everybody's", code="admin_only", hint="leave out all=true")
    return None
