"""Who asks, and what users, keys, sessions and audit entries are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from atelier.model.errors import InvalidRequestError


class Role(StrEnum):
    """``member``: what is their own or shared with them; ``admin``: everything."""

    MEMBER = "member"
    ADMIN = "admin"


class Scope(StrEnum):
    """What a key may be used for, never more than its user may. ``read``: look at things; ``write``: create, change, use
    and destroy sandboxes; ``account``: keys and sessions of its user; ``admin``: what only admins may."""

    READ = "read"
    WRITE = "write"
    ACCOUNT = "account"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sends a request. ``key_id`` or ``session_id`` says by what they are known, the other is empty."""

    user_id: str
    name: str
    role: Role
    scopes: frozenset[Scope]
    key_id: str = ""
    session_id: str = ""

    @property
    def is_admin(self) -> bool:
        """An admin whose key may be used as one: others are shown what a member is shown."""
        return self.role is Role.ADMIN and Scope.ADMIN in self.scopes

    @property
    def viewer_id(self) -> str | None:
        """Whose things a list is narrowed to; None: everybody's."""
        return None if self.is_admin else self.user_id


@dataclass(frozen=True, slots=True)
class User:
    """``email``: lower case; empty for the local admin. ``is_local``: the first admin, whose key is the local one."""

    id: str
    name: str
    email: str
    role: Role
    is_disabled: bool
    is_local: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ApiKey:
    """``hint``: its last four characters, to tell keys apart. ``expires_at`` None: never."""

    id: str
    user_id: str
    name: str
    hint: str
    scopes: frozenset[Scope]
    is_local: bool
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class BrowserSession:
    """``provider``: how its user signed in. ``address``: from where."""

    id: str
    user_id: str
    provider: str
    address: str
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what, when, from where. ``through``: ``key <id>``, ``session <id>`` or a provider's name. ``subject``: what
    it was done to, as the request named it. ``status``: the answer's."""

    id: int
    at: datetime
    user_id: str
    user_name: str
    through: str
    operation: str
    subject: str
    status: int
    address: str


@dataclass(frozen=True, slots=True)
class SignedInPerson:
    """What an identity provider says of somebody. ``subject`` never changes; ``email`` is verified, or empty.
    ``is_admitted``: the provider's own rule, as being of an organisation, lets them in."""

    provider: str
    subject: str
    name: str
    email: str
    is_admitted: bool = False


def validate_email(email: str) -> str:
    """Lower case. Raises InvalidRequestError."""
    local, separator, domain = email.strip().lower().rpartition("@")
    if not separator or not local or "." not in domain or len(email) > 254 or not email.isprintable() or " " in email:
        raise InvalidRequestError(
            f"{email!r} is no e-mail address", code="invalid_email", hint="write name@example.org"
        )
    return f"{local}@{domain}"
