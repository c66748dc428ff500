"""The routes that change a sandbox that exists, and those of the host: what is sent, and how the answer is read.

``sandbox_life.py`` gives the first to people, the CLI's ``down`` and ``doctor`` the others. Without I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel

from atelier.client.addresses import encode_segment
from atelier.client.call import (
    ANSWER_TIMEOUT_SECONDS,
    API,
    KEEP,
    WAIT_AT_MOST_SECONDS,
    Call,
    Keep,
    make_body,
    make_patch,
    read_model,
    read_nothing,
    sandbox_path,
    wait_query,
)
from atelier.client.sandbox_failures import is_stuck
from atelier.model.errors import InvalidRequestError, TimeoutExceededError
from atelier.model.orphan import OrphanKind
from atelier.schemas.host import OrphanList, ShutdownAnswer, ShutdownRequest
from atelier.schemas.sandboxes import ChangeSandboxRequest, ResizeRequest, ResumeRequest, Sandbox, StopRequest

_ACCEPTED = 202
_RESIZE_WAIT_AT_MOST_SECONDS = 3600.0

# -- sandboxes -----------------------------------------------------------------------------------------------------


def start_sandbox(sandbox: str, *, wait_seconds: float) -> Call[Sandbox]:
    return _order("start", sandbox, wait_seconds)


def stop_sandbox(sandbox: str, *, grace_seconds: float | None, wait_seconds: float) -> Call[Sandbox]:
    """``grace_seconds``: how long its guest may take before it is cut off; None: the manager's choice."""
    return _order("stop", sandbox, wait_seconds, StopRequest, grace_seconds=grace_seconds)


def restart_sandbox(sandbox: str, *, grace_seconds: float | None, wait_seconds: float) -> Call[Sandbox]:
    return _order("restart", sandbox, wait_seconds, StopRequest, grace_seconds=grace_seconds)


def pause_sandbox(sandbox: str, *, wait_seconds: float) -> Call[Sandbox]:
    return _order("pause", sandbox, wait_seconds)


def resume_sandbox(sandbox: str, *, from_disk: bool, wait_seconds: float) -> Call[Sandbox]:
    """``from_disk``: boot it, and give its memory up."""
    return _order("resume", sandbox, wait_seconds, ResumeRequest, from_disk=from_disk)


def retry_sandbox(sandbox: str, *, wait_seconds: float) -> Call[Sandbox]:
    return _order("retry", sandbox, wait_seconds)


def resize_sandbox(sandbox: str, disk_mib: int, *, wait_seconds: float) -> Call[Sandbox]:
    """One request for the whole wait: a sandbox that grows stays ``running``, so its state says nothing of the end.
    Raises TimeoutExceededError when it has not come by then."""
    operation = f"resize the sandbox {sandbox}"
    wait_seconds = min(wait_seconds, _RESIZE_WAIT_AT_MOST_SECONDS)
    read = read_model(Sandbox, operation)

    def parse(status: int, content: bytes) -> Sandbox:
        details = read(status, content)
        if wait_seconds > 0 and status == _ACCEPTED and not is_stuck(details):
            raise TimeoutExceededError(
                f"the disk of sandbox {details.name} was not resized within {wait_seconds:g} s",
                hint="it goes on; `atelier events` tells when it is done",
            )
        return details

    return Call(
        operation,
        "POST",
        sandbox_path(sandbox, f"/resize{wait_query(wait_seconds)}"),
        parse,
        make_body(ResizeRequest, operation, disk_mib=disk_mib),
        read_timeout_seconds=wait_seconds + ANSWER_TIMEOUT_SECONDS,
    )


def change_sandbox(
    sandbox: str, *, expires_at: datetime | Keep | None, auto_stop_after_idle_seconds: int | Keep | None
) -> Call[Sandbox]:
    """None takes a limit away."""
    operation = f"change the time limits of {sandbox}"
    limits = {"expires_at": expires_at, "auto_stop_after_idle_seconds": auto_stop_after_idle_seconds}
    given = {name: value for name, value in limits.items() if value is not KEEP}
    body = make_patch(ChangeSandboxRequest, operation, **given)
    return Call(operation, "PATCH", sandbox_path(sandbox), read_model(Sandbox, operation), body, repeatable=True)


def moment_of_expiry(expires_at: datetime | None, expires_in_seconds: float | None) -> datetime | None:
    """The one of the two that is given; the second counts from now, by this machine's clock."""
    if expires_at is not None and expires_in_seconds is not None:
        raise InvalidRequestError("expires_at and expires_in_seconds exclude each other", hint="give one of them")
    if expires_in_seconds is None:
        return expires_at
    try:
        return datetime.now(UTC) + timedelta(seconds=expires_in_seconds)
    except (OverflowError, ValueError) as error:
        raise InvalidRequestError(
            f"no date is {expires_in_seconds} s away", hint="give a shorter time, or no expiry at all"
        ) from error


# -- the host ------------------------------------------------------------------------------------------------------


def list_orphans() -> Call[OrphanList]:
    operation = "list what belongs to nobody"
    return Call(operation, "GET", f"{API}/host/orphans", read_model(OrphanList, operation), repeatable=True)


def remove_orphan(kind: OrphanKind, orphan_id: str) -> Call[None]:
    path = f"{API}/host/orphans/{kind}/{encode_segment(orphan_id, kind)}"
    return Call(f"remove the {kind} {orphan_id}", "DELETE", path, read_nothing)


def shut_down(sandboxes: Literal["keep", "stop", "destroy"]) -> Call[ShutdownAnswer]:
    """Answers when the sandboxes are stopped or destroyed, however long that takes; the manager ends after it."""
    operation = "end the manager"
    body = make_patch(ShutdownRequest, operation, sandboxes=sandboxes)
    path = f"{API}/host/shutdown"
    return Call(operation, "POST", path, read_model(ShutdownAnswer, operation), body, read_timeout_seconds=None)


# -- pieces --------------------------------------------------------------------------------------------------------


def _order(
    verb: str, sandbox: str, wait_seconds: float, kind: type[BaseModel] | None = None, **fields: Any
) -> Call[Sandbox]:
    operation = f"{verb} the sandbox {sandbox}"
    wait_seconds = min(wait_seconds, WAIT_AT_MOST_SECONDS)
    read: Callable[[int, bytes], Sandbox] = read_model(Sandbox, operation)
    return Call(
        operation,
        "POST",
        sandbox_path(sandbox, f"/{verb}{wait_query(wait_seconds)}"),
        read,
        make_body(kind, operation, **fields) if kind is not None else None,
        read_timeout_seconds=wait_seconds + ANSWER_TIMEOUT_SECONDS,
    )
