"""Users, API keys, browser sessions, shares, the audit log: what is asked for and what is answered."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, Field, StrictBool, StringConstraints

from atelier.model.principal import Role, Scope
from atelier.schemas.request_body import RequestBody

ShownName = Annotated[str, StringConstraints(min_length=1, max_length=100, strip_whitespace=True)]
EmailText = Annotated[str, StringConstraints(min_length=3, max_length=254)]


class Whoami(BaseModel):
    """Whose key or session was sent, and what it may be used for. ``key_id`` or ``session_id`` is empty."""

    user_id: str
    name: str
    role: Role
    scopes: list[Scope]
    key_id: str
    session_id: str


class User(BaseModel):
    """``is_local``: the first admin, whose key stands in the token file on the manager's machine."""

    id: str
    name: str
    email: str
    role: Role
    is_disabled: bool
    is_local: bool
    created_at: datetime


class UserList(BaseModel):
    items: list[User]


class AddUserRequest(RequestBody):
    """Somebody who may sign in with this address, once a provider vouches that it is theirs."""

    email: EmailText
    name: ShownName | None = None
    role: Role = Role.MEMBER


class ChangeUserRequest(RequestBody):
    """What is absent stays as it is."""

    name: ShownName | None = None
    role: Role | None = None
    is_disabled: StrictBool | None = None


class FirstRunLink(BaseModel):
    url: str


class ApiKey(BaseModel):
    """``hint``: its last four characters. ``last_used_at`` lags behind by up to a minute. ``is_local``: the one in the
    token file."""

    id: str
    user_id: str
    name: str
    hint: str
    scopes: list[Scope]
    is_local: bool
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None


class ApiKeyList(BaseModel):
    items: list[ApiKey]


class CreateApiKeyRequest(RequestBody):
    """``scopes`` absent: all that the key or session has that asks. ``expires_at`` absent: never.
    ``user``: whose it is to be, by id or e-mail address, which admins may say; absent: one's own."""

    name: ShownName
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=len(Scope))] | None = None
    expires_at: AwareDatetime | None = None
    user: EmailText | None = None


class CreatedApiKey(ApiKey):
    """``key`` is shown this once."""

    key: str


class BrowserSession(BaseModel):
    """``provider``: how its user signed in; ``address``: from where."""

    id: str
    user_id: str
    provider: str
    address: str
    created_at: datetime
    expires_at: datetime


class BrowserSessionList(BaseModel):
    items: list[BrowserSession]


class ShareRequest(RequestBody):
    """``user``: id or e-mail address."""

    user: EmailText


class Share(BaseModel):
    user_id: str
    name: str
    email: str


class ShareList(BaseModel):
    items: list[Share]


class AuditEntry(BaseModel):
    """``through``: the key or session that was used. ``subject``: what the request named. ``status``: the answer's."""

    id: int
    at: datetime
    user_id: str
    user_name: str
    through: str
    operation: str
    subject: str
    status: int
    address: str


class AuditPage(BaseModel):
    """``next_before`` is absent on the last page."""

    items: list[AuditEntry]
    next_before: int | None = None
