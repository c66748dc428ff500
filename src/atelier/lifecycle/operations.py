"""What can be done to a sandbox that exists: which saga does it, from which states, and what the row says meanwhile.

Read by ``sandboxes``, which begins them, and by the tests that fail every saga at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

from atelier.lifecycle import sandbox_pause, sandbox_resize, sandbox_resume, sandbox_start, sandbox_stop
from atelier.model.errors import ConflictError
from atelier.model.sandbox import Sandbox
from atelier.model.states import SandboxState


@dataclass(frozen=True, slots=True)
class Operation:
    """``meanwhile`` None: the sandbox keeps its state while the saga runs."""

    kind: str
    verb: str
    begins_from: frozenset[SandboxState]
    meanwhile: SandboxState | None

    def saga_id(self, sandbox_id: str) -> str:
        """One of a kind at a time: its record goes when it has ended."""
        return f"{self.kind}/{sandbox_id}"

    def check(self, sandbox: Sandbox) -> None:
        """Raise ConflictError (``invalid_state``) where it cannot begin."""
        if sandbox.state not in self.begins_from:
            allowed = " or ".join(sorted(self.begins_from))
            raise ConflictError(
                f"cannot {self.verb} sandbox {sandbox.name}: it is {sandbox.state}",
                code="invalid_state",
                hint=f"only a sandbox that is {allowed} can be told to {self.verb}",
            )


START = Operation(
    sandbox_start.KIND, "start", frozenset({SandboxState.STOPPED, SandboxState.FAILED}), SandboxState.STARTING
)
BOOT_AGAIN = Operation(sandbox_start.KIND, "boot again", frozenset({SandboxState.RUNNING}), SandboxState.STARTING)
"""After a reboot of the host, which took the machine of a running sandbox away."""
STOP = Operation(sandbox_stop.KIND, "stop", frozenset({SandboxState.RUNNING}), SandboxState.STOPPING)
RESIZE = Operation(
    sandbox_resize.KIND, "resize", frozenset({SandboxState.RUNNING, SandboxState.STOPPED}), meanwhile=None
)
PAUSE = Operation(sandbox_pause.KIND, "pause", frozenset({SandboxState.RUNNING}), SandboxState.PAUSING)
RESUME = Operation(sandbox_resume.KIND, "resume", frozenset({SandboxState.PAUSED}), SandboxState.RESUMING)
BOOT_FROM_DISK = Operation(
    sandbox_start.KIND, "boot from its disk", frozenset({SandboxState.PAUSED}), SandboxState.STARTING
)
"""A paused sandbox whose memory is given up."""
OPERATIONS = (START, STOP, RESIZE, BOOT_AGAIN, PAUSE, RESUME, BOOT_FROM_DISK)
