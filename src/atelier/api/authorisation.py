"""What each operation takes, in one table, and the one dependency that holds every request to it.

``application`` puts ``authorise`` before all routes of the API, WebSockets included; a test refuses a route that has no
rule. A sandbox or snapshot that the path names is looked up here, for whom it is: what somebody may not see does not
exist for them. Routes then receive its id, whatever name was sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from atelier.api.parameters import REFERENCE_MAX_LENGTH, services_of
from atelier.model.errors import AccessDeniedError
from atelier.model.principal import Principal, Role, Scope


class Right(Enum):
    """``OPEN``: everybody, known or not; ``KNOWN``: whoever has a key or session that is good; the others: those whose
    key has that scope, and for ``ADMIN`` whose role is admin."""

    OPEN = "open"
    KNOWN = "known"
    READ = Scope.READ
    WRITE = Scope.WRITE
    ACCOUNT = Scope.ACCOUNT
    ADMIN = Scope.ADMIN


@dataclass(frozen=True, slots=True)
class Rule:
    """``owner_only``: what the path names must be one's own, and not only shared. ``is_audited``: it stands in the audit
    log."""

    right: Right
    owner_only: bool = False
    is_audited: bool = False


_READ = Rule(Right.READ)
_WRITE = Rule(Right.WRITE, is_audited=True)
_WRITE_UNSAID = Rule(Right.WRITE)
"""Pieces of something that was said when it began: a log of keystrokes helps nobody."""
_OWNER = Rule(Right.WRITE, owner_only=True, is_audited=True)
_ADMIN = Rule(Right.ADMIN, is_audited=True)
_ADMIN_READ = Rule(Right.ADMIN)
_ACCOUNT = Rule(Right.ACCOUNT, is_audited=True)
_ACCOUNT_READ = Rule(Right.ACCOUNT)

RULES: dict[str, Rule] = {
    "get_health": Rule(Right.OPEN),
    "get_whoami": Rule(Right.KNOWN),
    "show_sign_in": Rule(Right.OPEN),
    "begin_sign_in": Rule(Right.OPEN),
    "finish_sign_in": Rule(Right.OPEN),
    "show_first_run": Rule(Right.OPEN),
    "use_first_run": Rule(Right.OPEN),
    "sign_out": Rule(Right.OPEN),
    "enter_preview": Rule(Right.OPEN),
    # sandboxes
    "create_sandbox": _WRITE,
    "list_sandboxes": _READ,
    "get_sandbox": _READ,
    "change_sandbox": _WRITE,
    "start_sandbox": _WRITE,
    "stop_sandbox": _WRITE,
    "restart_sandbox": _WRITE,
    "pause_sandbox": _WRITE,
    "resume_sandbox": _WRITE,
    "resize_sandbox": _WRITE,
    "retry_sandbox": _WRITE,
    "destroy_sandbox": _OWNER,
    "get_console": _READ,
    "get_metrics": _READ,
    "list_shares": _READ,
    "share_sandbox": _OWNER,
    "unshare_sandbox": _OWNER,
    "list_ports": _READ,
    "get_port": _READ,
    "set_port_visibility": _OWNER,
    "make_preview_link": _OWNER,
    "make_preview_visit": _WRITE,
    "get_network": _READ,
    "set_network": _WRITE,
    "change_network": _WRITE,
    # snapshots
    "take_snapshot": _WRITE,
    "fork_sandbox": _WRITE,
    "list_snapshots": _READ,
    "get_snapshot": _READ,
    "delete_snapshot": _OWNER,
    # inside
    "exec_process": _WRITE,
    "run_process": _WRITE,
    "list_processes": _READ,
    "attach_process": _READ,
    "send_stdin": _WRITE_UNSAID,
    "close_stdin": _WRITE_UNSAID,
    "send_signal": _WRITE,
    "open_terminal": _WRITE,
    "list_terminal_sessions": _READ,
    "open_terminal_session": _WRITE,
    "change_terminal_session": _WRITE,
    "close_terminal_session": _WRITE,
    "attach_terminal_session": _WRITE,
    "show_terminal_page": _READ,
    "get_terminal_asset": Rule(Right.KNOWN),
    "read_file": _READ,
    "write_file": _WRITE,
    "remove_file": _WRITE,
    "stat_file": _READ,
    "list_files": _READ,
    "make_directory": _WRITE,
    "move_file": _WRITE,
    "read_archive": _READ,
    "write_archive": _WRITE,
    # the host
    "stream_events": _READ,
    "list_images": _READ,
    "build_image": _ADMIN,
    "list_warm_pools": _ADMIN_READ,
    "set_warm_pool": _ADMIN,
    "drain_warm_pool": _ADMIN,
    "list_orphans": _ADMIN_READ,
    "remove_orphan": _ADMIN,
    "shut_down": _ADMIN,
    "scrape_metrics": _ADMIN_READ,
    # people
    "list_users": _ADMIN_READ,
    "add_user": _ADMIN,
    "change_user": _ADMIN,
    "list_api_keys": _ACCOUNT_READ,
    "create_api_key": _ACCOUNT,
    "revoke_api_key": _ACCOUNT,
    "get_ssh": _READ,
    "list_ssh_keys": _ACCOUNT_READ,
    "add_ssh_key": _ACCOUNT,
    "delete_ssh_key": _ACCOUNT,
    "list_sessions": _ACCOUNT_READ,
    "revoke_session": _ACCOUNT,
    "list_audit_entries": _ADMIN_READ,
    "create_first_run_link": _ADMIN,
}
"""By operation id; a WebSocket's is its function's name."""


async def authorise(connection: HTTPConnection) -> None:
    """Raises AccessDeniedError (``admin_only``, ``scope_missing``, ``not_owner``), NotFoundError."""
    route = connection.scope["route"]
    operation: str = getattr(route, "operation_id", None) or route.name
    rule = RULES[operation]
    if rule.right is Right.OPEN:
        return
    state = connection.scope["state"]
    principal = caller_of(connection)
    if rule.is_audited:
        state["operation"] = operation
    state["subject"] = "/".join(connection.path_params.values())
    if isinstance(rule.right.value, Scope):
        _check_scope(principal, rule.right.value, operation)
    access = services_of(connection).access
    for name, find in (("sandbox", access.find_sandbox), ("snapshot", access.find_snapshot)):
        reference = connection.path_params.get(name, "")
        # What is too long for any, the route says better.
        if reference and len(reference) <= REFERENCE_MAX_LENGTH:
            connection.path_params[name] = find(principal, reference, as_owner=rule.owner_only)
            state["subject"] = "/".join(connection.path_params.values())


def _check_scope(principal: Principal, scope: Scope, operation: str) -> None:
    if scope is Scope.ADMIN and principal.role is not Role.ADMIN:
        raise AccessDeniedError(f"{operation} is for admins", code="admin_only", hint="ask an admin of this manager")
    if scope not in principal.scopes:
        raise AccessDeniedError(
            f"this key's scopes do not reach {operation}",
            code="scope_missing",
            hint=f"make a key with the scope {scope}: atelier key create",
        )


def caller_of(connection: HTTPConnection) -> Principal:
    """Whom the gate has found; it lets nobody else come this far."""
    principal = connection.scope["state"]["principal"]
    assert isinstance(principal, Principal)
    return principal


async def _caller(connection: HTTPConnection) -> Principal:
    return caller_of(connection)


Caller = Annotated[Principal, Depends(_caller)]
"""The parameter of a route that does different things for different people."""
