"""The routes of users, keys, shares and the audit log: what is sent, and how the answer is read. Without I/O."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from atelier.client.addresses import encode_query, encode_segment
from atelier.client.call import API, Call, make_body, read_model, read_nothing, sandbox_path
from atelier.model.principal import Role, Scope
from atelier.schemas.accounts import (
    AddUserRequest,
    ApiKeyList,
    AuditPage,
    ChangeUserRequest,
    CreateApiKeyRequest,
    CreatedApiKey,
    FirstRunLink,
    Share,
    ShareList,
    ShareRequest,
    User,
    UserList,
    Whoami,
)


def get_whoami() -> Call[Whoami]:
    operation = "find out whose the key is"
    return Call(operation, "GET", f"{API}/whoami", read_model(Whoami, operation), repeatable=True)


def list_users() -> Call[UserList]:
    operation = "list the users"
    return Call(operation, "GET", f"{API}/users", read_model(UserList, operation), repeatable=True)


def add_user(email: str, name: str | None, role: Role) -> Call[User]:
    operation = f"add the user {email}"
    body = make_body(AddUserRequest, operation, email=email, name=name, role=role)
    return Call(operation, "POST", f"{API}/users", read_model(User, operation), body)


def change_user(user: str, *, role: Role | None = None, is_disabled: bool | None = None) -> Call[User]:
    operation = f"change the user {user}"
    body = make_body(ChangeUserRequest, operation, role=role, is_disabled=is_disabled)
    path = f"{API}/users/{encode_segment(user, 'user')}"
    return Call(operation, "PATCH", path, read_model(User, operation), body, repeatable=True)


def create_first_run_link() -> Call[FirstRunLink]:
    operation = "make a first-run link"
    return Call(operation, "POST", f"{API}/first-run-link", read_model(FirstRunLink, operation))


def list_api_keys(*, everybodys: bool) -> Call[ApiKeyList]:
    operation = "list the keys"
    query = encode_query([("all", "true")] if everybodys else [])
    return Call(operation, "GET", f"{API}/api-keys{query}", read_model(ApiKeyList, operation), repeatable=True)


def create_api_key(
    name: str, scopes: Sequence[Scope], expires_at: datetime | None, user: str | None
) -> Call[CreatedApiKey]:
    operation = f"make the key {name}"
    body = make_body(
        CreateApiKeyRequest, operation, name=name, scopes=list(scopes) or None, expires_at=expires_at, user=user
    )
    return Call(operation, "POST", f"{API}/api-keys", read_model(CreatedApiKey, operation), body)


def revoke_api_key(key_id: str) -> Call[None]:
    return Call(f"revoke the key {key_id}", "DELETE", f"{API}/api-keys/{encode_segment(key_id, 'key')}", read_nothing)


def list_shares(sandbox: str) -> Call[ShareList]:
    operation = f"list with whom sandbox {sandbox} is shared"
    return Call(operation, "GET", sandbox_path(sandbox, "/shares"), read_model(ShareList, operation), repeatable=True)


def share_sandbox(sandbox: str, user: str) -> Call[Share]:
    operation = f"share sandbox {sandbox} with {user}"
    body = make_body(ShareRequest, operation, user=user)
    return Call(
        operation, "POST", sandbox_path(sandbox, "/shares"), read_model(Share, operation), body, repeatable=True
    )


def unshare_sandbox(sandbox: str, user: str) -> Call[None]:
    path = sandbox_path(sandbox, f"/shares/{encode_segment(user, 'user')}")
    return Call(f"stop sharing sandbox {sandbox} with {user}", "DELETE", path, read_nothing)


def list_audit_entries(limit: int, user_id: str, operation_id: str) -> Call[AuditPage]:
    operation = "read the audit log"
    query = encode_query(
        [
            ("limit", str(limit)),
            *([("user", user_id)] if user_id else []),
            *([("operation", operation_id)] if operation_id else []),
        ]
    )
    return Call(operation, "GET", f"{API}/audit{query}", read_model(AuditPage, operation), repeatable=True)
