"""Signing in with a browser: at an identity provider, or for the first admin with the first-run link. No passwords.

Called by the pages. Attempts are kept in memory for ten minutes: after a restart of the manager one begins again.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from atelier.db.engine import Connection, Database
from atelier.db.first_run import FirstRunRepository
from atelier.db.users import UserRepository
from atelier.drivers.sign_in.interface import SignInAttempt, SignInProvider
from atelier.model.errors import AccessDeniedError, AuthenticationError, ConflictError, NotFoundError
from atelier.model.ids import new_sandbox_id
from atelier.model.principal import Role, SignedInPerson, User
from atelier.services.accounts import AccountService
from atelier.services.authentication import hash_secret

_ATTEMPT_LIFETIME = timedelta(minutes=10)
_ATTEMPTS_AT_MOST = 1000
_FIRST_RUN_LIFETIME = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Admission:
    """Verified e-mail addresses, and domains of such, whose people may sign in without an admin having added them. Lower
    case."""

    emails: frozenset[str]
    domains: frozenset[str]

    def admits(self, person: SignedInPerson) -> bool:
        email, domain = person.email, person.email.rpartition("@")[2]
        return person.is_admitted or bool(email and (email in self.emails or domain in self.domains))


@dataclass(frozen=True, slots=True)
class _Begun:
    provider: str
    browser: str
    attempt: SignInAttempt
    until: datetime


class SignInService:
    """``public_url``: where browsers reach this manager, without a slash at its end."""

    def __init__(
        self,
        database: Database,
        accounts: AccountService,
        providers: Mapping[str, SignInProvider],
        admission: Admission,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._accounts = accounts
        self._admission = admission
        self._now = now
        self._users = UserRepository()
        self._first_run = FirstRunRepository()
        self._begun: dict[str, _Begun] = {}
        self.providers = providers

    # --- identity providers -------------------------------------------------------------------------------------------

    async def begin(self, provider: str, public_url: str) -> tuple[str, str]:
        """(where the browser is to go, what it has to bring back). Raises NotFoundError, IdentityProviderError."""
        chosen = self._get_provider(provider)
        browser, state = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        attempt = SignInAttempt(
            state=state,
            nonce=secrets.token_urlsafe(32),
            code_verifier=secrets.token_urlsafe(48),
            redirect_url=f"{public_url}/sign-in/{provider}/callback",
        )
        url = await chosen.make_url(attempt)
        now = self._now()
        self._begun = {key: each for key, each in self._begun.items() if each.until > now}
        while len(self._begun) >= _ATTEMPTS_AT_MOST:
            del self._begun[next(iter(self._begun))]
        self._begun[state] = _Begun(provider, hash_secret(browser), attempt, now + _ATTEMPT_LIFETIME)
        return url, browser

    async def finish(self, provider: str, state: str, code: str, browser: str, address: str) -> tuple[User, str]:
        """The user and the token of their new session. Each attempt is good once.

        Raises NotFoundError, AuthenticationError (``sign_in_expired``, ``sign_in_refused``, ``user_disabled``),
        AccessDeniedError (``not_admitted``), IdentityProviderError.
        """
        chosen = self._get_provider(provider)
        begun = self._begun.pop(state, None)
        is_its_browser = begun is not None and hmac.compare_digest(begun.browser, hash_secret(browser))
        if begun is None or not is_its_browser or begun.provider != provider or begun.until <= self._now():
            raise AuthenticationError(
                "this sign-in was not begun in this browser, or is over",
                code="sign_in_expired",
                hint="begin again, at /sign-in",
            )
        if not code:
            raise AuthenticationError(
                f"the sign-in was not agreed to at {chosen.title}",
                code="sign_in_refused",
                hint="begin again, at /sign-in",
            )
        person = await chosen.find_person(begun.attempt, code)
        user = await self._database.write(lambda connection: self._admit(connection, person))
        if user.is_disabled:
            raise AuthenticationError(
                f"the user {user.name} is disabled", code="user_disabled", hint="an admin can enable them again"
            )
        _, token = await self._accounts.open_session(user.id, provider, address)
        return user, token

    def _admit(self, connection: Connection, person: SignedInPerson) -> User:
        known = self._users.find_by_identity(connection, person.provider, person.subject)
        if known is not None:
            return known
        user = self._users.find_by_email(connection, person.email) if person.email else None
        # An address that was somebody's at this provider and is somebody else's now opens nothing.
        is_taken = user is not None and self._users.has_identity(connection, user.id, person.provider)
        if is_taken or (user is None and not self._admission.admits(person)):
            raise AccessDeniedError(
                f"{person.name} may not enter here",
                code="not_admitted",
                hint="ask an admin of this manager to add your verified e-mail address: atelier user add",
            )
        if user is None:
            user = User(new_sandbox_id(), person.name, person.email, Role.MEMBER, False, False, self._now())
            self._users.insert(connection, user)
        self._users.add_identity(connection, person.provider, person.subject, user.id)
        return user

    def _get_provider(self, name: str) -> SignInProvider:
        if name not in self.providers:
            raise NotFoundError(
                f"there is no identity provider {name!r}",
                code="provider_not_found",
                hint="see /sign-in for those there are",
            )
        return self.providers[name]

    # --- the first admin ----------------------------------------------------------------------------------------------

    async def make_first_link(self) -> str | None:
        """At a start of the manager: the secret of a link, if none is there that is good and nobody needs another."""

        def make(connection: Connection) -> str | None:
            present = self._first_run.find(connection)
            if self._is_over(connection) or self._first_run.was_used(connection):
                return None
            if present is not None and present[1] > self._now():
                return None
            return self._put_link(connection)

        return await self._database.write(make)

    async def make_another_link(self) -> str:
        """When somebody with the local key asks: its secret; the one before is worth nothing then. Raises ConflictError
        (``first_run_over``)."""

        def make(connection: Connection) -> str:
            if self._is_over(connection):
                raise _over()
            return self._put_link(connection)

        return await self._database.write(make)

    async def use_first_link(self, secret: str, address: str) -> tuple[User, str]:
        """The local admin and the token of their new session.

        Raises ConflictError (``first_run_over``), AuthenticationError (``first_run_link_invalid``).
        """

        def use(connection: Connection) -> User:
            present = self._first_run.find(connection)
            is_right = present is not None and hmac.compare_digest(present[0], hash_secret(secret))
            if present is None and (self._first_run.was_used(connection) or self._is_over(connection)):
                raise _over()
            if not is_right or present is None or present[1] <= self._now():
                raise AuthenticationError(
                    "this link is not good, or no longer",
                    code="first_run_link_invalid",
                    hint="make another on the manager's machine: atelier user link",
                )
            self._first_run.set_used(connection)
            admin = self._users.find_local(connection)
            assert admin is not None
            return admin

        admin = await self._database.write(use)
        _, token = await self._accounts.open_session(admin.id, "first-run link", address)
        return admin, token

    def _put_link(self, connection: Connection) -> str:
        secret = secrets.token_urlsafe(32)
        self._first_run.put(connection, hash_secret(secret), self._now() + _FIRST_RUN_LIFETIME)
        return secret

    def _is_over(self, connection: Connection) -> bool:
        """Once there is another admin, that one signs in as everybody does."""
        return self._users.count_other_admins(connection) > 0


def _over() -> ConflictError:
    return ConflictError(
        "the first-run link was used, or this manager has admins who sign in",
        code="first_run_over",
        hint="sign in at /sign-in; without another admin: atelier user link",
    )
