"""What can go wrong with a sandbox as a whole, in words. Raised by ``sandbox.py``."""

from __future__ import annotations

from atelier.client.call import WAIT_AT_MOST_SECONDS
from atelier.client.calls import Command, to_arguments
from atelier.model.errors import AtelierError, GuestError, TimeoutExceededError
from atelier.model.states import SandboxState
from atelier.schemas.processes import RunResult
from atelier.schemas.sandboxes import Sandbox as SandboxDetails


class SandboxFailedError(AtelierError):
    """A sandbox ended as ``failed``, or is stuck, instead of becoming what was asked for. ``code`` and ``hint`` are
    those of the reason that the manager recorded; ``details`` is its row, with the last lines of its console."""

    default_code = "sandbox_failed"

    def __init__(self, details: SandboxDetails) -> None:
        cause = details.failure
        if cause is None:
            message = f"the sandbox {details.name} is {details.state} by now"
        elif details.state is SandboxState.FAILED:
            message = f"the sandbox {details.name} failed: {cause.message}"
        elif is_stuck(details):
            message = f"the sandbox {details.name} is {cause.message}"
        else:
            message = f"the sandbox {details.name} is {details.state}: {cause.message}"
        super().__init__(
            message,
            hint=(cause.hint if cause else "")
            or f"see `atelier logs {details.name}`, then `atelier rm {details.name}`",
            code=cause.code if cause else "",
        )
        self.details = details


def is_stuck(details: SandboxDetails) -> bool:
    """What is under way with it (or cleaning up after it) does not go on by itself; ``failure`` says why."""
    return details.failure is not None and details.failure.code.endswith("_stuck")


_GOALS = {
    SandboxState.CREATING: "did not run",
    SandboxState.STARTING: "did not run",
    SandboxState.STOPPING: "was not stopped",
    SandboxState.PAUSING: "was not paused",
    SandboxState.RESUMING: "did not run",
    SandboxState.DESTROYING: "was not gone",
}


def not_in_time(details: SandboxDetails, seconds: float) -> TimeoutExceededError:
    return TimeoutExceededError(
        f"the sandbox {details.name} {_GOALS.get(details.state, f'was still {details.state}')} within {seconds:g} s",
        hint=f"it goes on: `atelier get {details.name}` shows it, `atelier rm {details.name}` gives it up",
    )


def not_gone_in_time(name: str) -> TimeoutExceededError:
    return TimeoutExceededError(
        f"the sandbox {name} was not gone within {WAIT_AT_MOST_SECONDS:g} s",
        hint="its removal goes on; `atelier ls` shows it until it is done",
    )


def program_failed(command: Command, result: RunResult) -> GuestError:
    reason = "was ended by its time limit" if result.error == "timeout" else f"exited with status {result.exit_code}"
    end = result.stderr.strip()[-2000:]
    return GuestError(f"{to_arguments(command)[0]} {reason}" + (f": {end}" if end else ""), code="program_failed")
