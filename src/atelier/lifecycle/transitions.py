"""The one place that changes a sandbox's state: checks the table, writes the row and the event in one transaction.

Called by the sagas' hooks and by ``sandboxes``, inside a transaction of theirs. Nothing else writes the state column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from atelier.db.engine import Connection, signal
from atelier.db.outbox import Outbox
from atelier.db.sandboxes import GuestSecrets, SandboxRepository
from atelier.model.sandbox import Sandbox
from atelier.model.states import SandboxState, StopReason, check_transition

STATE_CHANGED = "sandbox.state_changed"
DESTROYED = "sandbox.destroyed"
STUCK = "sandbox.stuck"
RESIZED = "sandbox.resized"
RESIZE_STUCK = "resize_stuck"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sandbox is in trouble, as its row keeps it. ``console_tail`` is text, safe to show."""

    code: str
    message: str
    hint: str = ""
    console_tail: str = ""


def sandbox_topic(sandbox_id: str) -> str:
    """What to subscribe to in order to wake whenever this sandbox's row changes or goes."""
    return f"sandbox/{sandbox_id}"


class Transitions:
    """Stateless but for where it writes. ``now`` is the clock of ``updated_at``."""

    def __init__(
        self, sandboxes: SandboxRepository, outbox: Outbox, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._sandboxes = sandboxes
        self._outbox = outbox
        self._now = now

    def begin(self, connection: Connection, sandbox: Sandbox, secrets: GuestSecrets) -> None:
        """Add the row of a new sandbox. Raises ConflictError (``name_taken``)."""
        self._sandboxes.insert(connection, sandbox, secrets)
        self._announce(connection, sandbox, previous=None)

    def apply(
        self,
        connection: Connection,
        sandbox_id: str,
        target: SandboxState,
        failure: Failure | None = None,
        *,
        stop_reason: StopReason | None = None,
    ) -> Sandbox:
        """Move a sandbox to ``target``. ``failure`` belongs to the state ``failed``, ``stop_reason`` to ``stopped``.

        Raises NotFoundError, and ConflictError (``invalid_state``) for a move that the table does not allow.
        """
        current = self._sandboxes.get(connection, sandbox_id)
        check_transition(sandbox_id, current.state, target)
        sandbox = self._write(connection, replace(current, state=target, stop_reason=stop_reason), failure)
        self._announce(connection, sandbox, previous=current.state)
        return sandbox

    def tell_resized(self, connection: Connection, sandbox_id: str) -> None:
        """The disk has the size that the row promises; trouble that was told of it is over."""
        sandbox = self._sandboxes.get(connection, sandbox_id)
        if sandbox.failure_code == RESIZE_STUCK:
            self._write(connection, sandbox, None)
        self._outbox.append(connection, RESIZED, sandbox_id, {"name": sandbox.name, "disk_mib": sandbox.spec.disk_mib})
        signal(connection, sandbox_topic(sandbox_id))

    def mark_stuck(self, connection: Connection, sandbox_id: str, failure: Failure) -> None:
        """Keep the state, but say what does not go on and what a person can do."""
        sandbox = self._write(connection, self._sandboxes.get(connection, sandbox_id), failure)
        payload = {"name": sandbox.name, "state": sandbox.state.value, "failure": _failure_payload(sandbox)}
        self._outbox.append(connection, STUCK, sandbox_id, payload)

    def restate(self, connection: Connection, sandbox_id: str, failure: Failure | None) -> None:
        """Keep the state, but replace or clear what the row says about trouble."""
        self._write(connection, self._sandboxes.get(connection, sandbox_id), failure)

    def end(self, connection: Connection, sandbox_id: str) -> None:
        """Remove the row: nothing of the sandbox is left."""
        sandbox = self._sandboxes.get(connection, sandbox_id)
        # While the row still says whose it is, which decides who reads of it.
        self._outbox.append(connection, DESTROYED, sandbox_id, {"name": sandbox.name})
        self._sandboxes.delete(connection, sandbox_id)
        signal(connection, sandbox_topic(sandbox_id))

    def _write(self, connection: Connection, sandbox: Sandbox, failure: Failure | None) -> Sandbox:
        words = failure or Failure("", "")
        changed = replace(
            sandbox,
            updated_at=self._now(),
            failure_code=words.code,
            failure_message=words.message,
            failure_hint=words.hint,
            console_tail=words.console_tail,
        )
        self._sandboxes.set_state(
            connection,
            changed.id,
            changed.state,
            changed.updated_at,
            failure_code=words.code,
            failure_message=words.message,
            failure_hint=words.hint,
            console_tail=words.console_tail,
            stop_reason=changed.stop_reason,
        )
        signal(connection, sandbox_topic(sandbox.id))
        return changed

    def _announce(self, connection: Connection, sandbox: Sandbox, *, previous: SandboxState | None) -> None:
        payload: dict[str, Any] = {
            "name": sandbox.name,
            "state": sandbox.state.value,
            "previous": None if previous is None else previous.value,
        }
        if sandbox.stop_reason is not None:
            payload["stop_reason"] = sandbox.stop_reason.value
        if sandbox.failure_code:
            payload["failure"] = _failure_payload(sandbox)
        self._outbox.append(connection, STATE_CHANGED, sandbox.id, payload)


def _failure_payload(sandbox: Sandbox) -> dict[str, str]:
    return {"code": sandbox.failure_code, "message": sandbox.failure_message, "hint": sandbox.failure_hint}
