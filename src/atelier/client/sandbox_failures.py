"""What can go wrong with a sandbox as a whole, in words. Raised by ``sandbox.py``."""

from __future__ import annotations

from atelier.client.calls import WAIT_AT_MOST_SECONDS, Command, to_arguments
from atelier.model.errors import AtelierError, GuestError, TimeoutExceededError
from atelier.schemas.processes import RunResult
from atelier.schemas.sandboxes import Sandbox as SandboxDetails


class SandboxFailedError(AtelierError):
    """A sandbox ended as ``failed`` instead of running. ``code`` and ``hint`` are those of the reason that the manager
    recorded; ``details`` is its row, with the last lines of its console."""

    default_code = "sandbox_failed"

    def __init__(self, details: SandboxDetails) -> None:
        cause = details.failure
        super().__init__(
            f"the sandbox {details.name} failed" + (f": {cause.message}" if cause else ""),
            hint=(cause.hint if cause else "")
            or f"see `atelier logs {details.name}`, then `atelier rm {details.name}`",
            code=cause.code if cause else "",
        )
        self.details = details


def not_in_time(details: SandboxDetails, seconds: float) -> TimeoutExceededError:
    return TimeoutExceededError(
        f"the sandbox {details.name} did not run within {seconds:g} s",
        hint=f"it is still being made: `atelier get {details.name}` shows it, `atelier rm {details.name}` gives it up",
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
