"""The states of a sandbox, and the one table of transitions between them.

``db`` stores the state; ``lifecycle/transitions.py`` holds the one function that applies a transition.
"""

from __future__ import annotations

from enum import StrEnum

from atelier.model.errors import ConflictError


class SandboxState(StrEnum):
    CREATING = "creating"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    STARTING = "starting"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    DESTROYING = "destroying"
    FAILED = "failed"


UNDER_WAY = frozenset(
    {
        SandboxState.CREATING,
        SandboxState.STARTING,
        SandboxState.STOPPING,
        SandboxState.PAUSING,
        SandboxState.RESUMING,
        SandboxState.DESTROYING,
    }
)
"""States in which a saga is at work."""


class StopReason(StrEnum):
    """Why a sandbox is stopped. ``forced``: its guest did not shut down in time and was cut off, so what it had not
    written to its disk is lost."""

    REQUESTED = "requested"
    FORCED = "forced"
    IDLE = "idle"


_S = SandboxState

TRANSITIONS: dict[SandboxState, frozenset[SandboxState]] = {
    _S.CREATING: frozenset({_S.RUNNING, _S.FAILED, _S.DESTROYING}),
    # To STARTING without being stopped first: the host was rebooted. To CREATING: it was taken from a warm pool.
    _S.RUNNING: frozenset({_S.STOPPING, _S.STARTING, _S.PAUSING, _S.CREATING, _S.FAILED, _S.DESTROYING}),
    _S.STOPPING: frozenset({_S.STOPPED, _S.FAILED, _S.DESTROYING}),
    _S.STOPPED: frozenset({_S.STARTING, _S.DESTROYING}),
    _S.STARTING: frozenset({_S.RUNNING, _S.FAILED, _S.DESTROYING}),
    _S.PAUSING: frozenset({_S.PAUSED, _S.RUNNING, _S.FAILED, _S.DESTROYING}),
    # To STARTING: its memory is given up, its disk is booted.
    _S.PAUSED: frozenset({_S.RESUMING, _S.STARTING, _S.DESTROYING}),
    _S.RESUMING: frozenset({_S.RUNNING, _S.PAUSED, _S.FAILED, _S.DESTROYING}),
    _S.FAILED: frozenset({_S.STARTING, _S.DESTROYING}),
    _S.DESTROYING: frozenset(),
}
"""Allowed next states. A destroyed sandbox has no row, so ``destroying`` has no successor."""


def check_transition(sandbox_id: str, current: SandboxState, target: SandboxState) -> None:
    """Raise ConflictError unless ``current -> target`` is in the table."""
    if target not in TRANSITIONS[current]:
        allowed = ", ".join(sorted(TRANSITIONS[current])) or "nothing"
        raise ConflictError(
            f"sandbox {sandbox_id} is {current} and cannot become {target}",
            code="invalid_state",
            hint=f"from {current} it may become: {allowed}",
        )
