"""A sandbox in words for people: its state with the reason, its time limits, what is the matter with it.

Called by ``ls``, ``get`` and the commands that change a sandbox. What it returns is not escaped yet.
"""

from __future__ import annotations

from datetime import UTC, datetime

from atelier.cli.output import show_age, show_duration
from atelier.client.sandbox_failures import is_stuck
from atelier.model.states import SandboxState, StopReason
from atelier.schemas.sandboxes import Sandbox

_STOP_REASONS = {StopReason.FORCED: "cut off", StopReason.IDLE: "idle"}
CUT_OFF = "cut off: its guest did not shut down in time; what it had not written to its disk is lost"


def show_state(sandbox: Sandbox) -> str:
    """``running``, ``stopped (idle)``, ``stopping (stuck)``."""
    remark = "stuck" if is_stuck(sandbox) else _STOP_REASONS.get(sandbox.stop_reason) if sandbox.stop_reason else None
    return f"{sandbox.state} ({remark})" if remark else str(sandbox.state)


def note_cut_off(sandbox: Sandbox) -> str:
    return CUT_OFF if sandbox.stop_reason is StopReason.FORCED else ""


def show_expiry(expires_at: datetime | None, now: datetime | None = None) -> str:
    """``expires in 1h 20m``; empty: never."""
    if expires_at is None:
        return ""
    seconds = (expires_at - (now or datetime.now(UTC))).total_seconds()
    return f"expires in {show_duration(round(seconds))}" if seconds > 0 else "has expired"


def show_idle_limit(seconds: int | None) -> str:
    return "" if seconds is None else f"stops when idle for {show_duration(seconds)}"


def show_limits(sandbox: Sandbox) -> str:
    """Both limits; empty: none."""
    limits = (show_expiry(sandbox.expires_at), show_idle_limit(sandbox.auto_stop_after_idle_seconds))
    return ", ".join(limit for limit in limits if limit)


def show_last_use(sandbox: Sandbox) -> str:
    if sandbox.auto_stop_after_idle_seconds is None or sandbox.last_active_at is None:
        return ""
    return f"{show_age(sandbox.last_active_at)} ago"


def list_trouble(sandbox: Sandbox) -> list[tuple[str, str]]:
    """What is the matter, and the remedy: pairs of label and text."""
    failure = sandbox.failure
    if failure is None:
        return []
    label = "failed" if sandbox.state is SandboxState.FAILED else "trouble"
    found = [(label, f"{failure.message} [{failure.code}]")]
    return [*found, ("hint", failure.hint)] if failure.hint else found
