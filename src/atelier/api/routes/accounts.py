"""Who one is; users; one's own API keys and browser sessions, and for admins everybody's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from atelier.api.authorisation import Caller
from atelier.api.parameters import services_of
from atelier.model import principal as model
from atelier.schemas.accounts import (
    AddUserRequest,
    ApiKey,
    ApiKeyList,
    BrowserSession,
    BrowserSessionList,
    ChangeUserRequest,
    CreateApiKeyRequest,
    CreatedApiKey,
    FirstRunLink,
    User,
    UserList,
    Whoami,
)

router = APIRouter(tags=["accounts"])

UserReference = Annotated[str, Path(description="id or e-mail address of the user", max_length=254)]
Everybodys = Annotated[bool, Query(alias="all", description="everybody's, for admins")]
Id = Annotated[str, Path(max_length=64)]


@router.get("/whoami", operation_id="get_whoami")
async def get_whoami(caller: Caller) -> Whoami:
    """Whose the key or session is, and what it may be used for."""
    return Whoami(
        user_id=caller.user_id,
        name=caller.name,
        role=caller.role,
        scopes=sorted(caller.scopes),
        key_id=caller.key_id,
        session_id=caller.session_id,
    )


@router.get("/users", operation_id="list_users")
async def list_users(request: Request) -> UserList:
    """List users, oldest first."""
    return UserList(items=[_user(each) for each in services_of(request).accounts.list_users()])


@router.post("/users", operation_id="add_user", status_code=201)
async def add_user(request: Request, body: AddUserRequest) -> User:
    """Let somebody sign in, whatever the settings say of organisations and domains. There is no password: an identity
    provider must vouch that the e-mail address is theirs."""
    return _user(await services_of(request).accounts.add_user(body.email, body.name or "", body.role))


@router.patch("/users/{user}", operation_id="change_user")
async def change_user(request: Request, user: UserReference, body: ChangeUserRequest) -> User:
    """Change a user's name or role, disable or enable them. Disabling ends their sessions; what is open stays open, and
    their next request is refused. Their keys and sandboxes stay."""
    changed = await services_of(request).accounts.change_user(user, body.role, body.is_disabled, body.name)
    return _user(changed)


@router.post("/first-run-link", operation_id="create_first_run_link", status_code=201)
async def create_first_run_link(request: Request) -> FirstRunLink:
    """A link that signs the local admin in, in a browser, once, within 24 hours; the one before is worth nothing then.
    Refused once there is another admin."""
    secret = await services_of(request).sign_in.make_another_link()
    return FirstRunLink(url=f"{request.app.state.public_url}/sign-in/first-run?secret={secret}")


@router.get("/api-keys", operation_id="list_api_keys")
async def list_api_keys(request: Request, caller: Caller, everybodys: Everybodys = False) -> ApiKeyList:
    """List one's own keys, oldest first; the keys themselves are not kept."""
    found = services_of(request).accounts.list_keys(caller, everybodys=everybodys)
    return ApiKeyList(items=[ApiKey.model_validate(_key(each)) for each in found])


@router.post("/api-keys", operation_id="create_api_key", status_code=201)
async def create_api_key(request: Request, caller: Caller, body: CreateApiKeyRequest) -> CreatedApiKey:
    """Make a key for oneself, or as an admin for somebody else; the answer is the only time that it is shown. `e2b_` in place of `atl_` is the same key, for
    clients that insist on that."""
    scopes = caller.scopes if body.scopes is None else frozenset(body.scopes)
    row, key = await services_of(request).accounts.create_key(
        caller, body.name, scopes, body.expires_at, user=body.user
    )
    request.state.subject = row.id
    return CreatedApiKey.model_validate({**_key(row), "key": key})


@router.delete("/api-keys/{key}", operation_id="revoke_api_key", status_code=204)
async def revoke_api_key(request: Request, caller: Caller, key: Id) -> Response:
    """Revoke a key, by its id. What it has opened stays open; its next request is refused."""
    await services_of(request).accounts.revoke_key(caller, key)
    return Response(status_code=204)


@router.get("/sessions", operation_id="list_sessions")
async def list_sessions(request: Request, caller: Caller, everybodys: Everybodys = False) -> BrowserSessionList:
    """List one's own browser sessions, oldest first."""
    found = services_of(request).accounts.list_sessions(caller, everybodys=everybodys)
    return BrowserSessionList(items=[BrowserSession(**asdict(each)) for each in found])


@router.delete("/sessions/{session}", operation_id="revoke_session", status_code=204)
async def revoke_session(request: Request, caller: Caller, session: Id) -> Response:
    """End a browser session. What it has opened stays open; its next request is refused."""
    await services_of(request).accounts.revoke_session(caller, session)
    return Response(status_code=204)


def _user(row: model.User) -> User:
    return User(**asdict(row))


def _key(row: model.ApiKey) -> dict[str, object]:
    return {**asdict(row), "scopes": sorted(row.scopes)}
