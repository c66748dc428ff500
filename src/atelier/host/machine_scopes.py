"""The scope of systemd's that a machine without a jailer is moved to: its own limits, and outside the manager's unit.

Called by the privileged helper program. The scope goes by itself when the machine has ended. Source:
org.freedesktop.systemd1(5), StartTransientUnit; systemd.resource-control(5).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from atelier.host import command, processes
from atelier.model.errors import CommandError, HostError
from atelier.model.machine import ProcessIdentity
from atelier.model.machine_limits import ProcessorAndMemoryLimits

SLICE = "atelier-vm.slice"
_MANAGER = "atelier-manager.service"
_SERVICE_MANAGER = Path("/run/systemd/system")
_SECOND_MICROSECONDS = 1_000_000
_MOVE_SECONDS = 30.0
_LOOK_AGAIN_SECONDS = 0.01


def is_possible() -> bool:
    """Whether this host's services are systemd's."""
    return _SERVICE_MANAGER.is_dir()


async def confine(name: str, process: ProcessIdentity, limits: ProcessorAndMemoryLimits) -> None:
    """Return once the process is in the scope of this name, where it may be already. Raises HostError
    (``scope_not_made``), MissingProgramError."""
    scope = f"{name}.scope"
    if _is_in(process, scope):
        return
    words = [
        *("busctl", "call", "--quiet", "org.freedesktop.systemd1", "/org/freedesktop/systemd1"),
        *("org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))", scope, "fail", "8"),
        *("Description", "s", "A virtual machine of Atelier's"),
        *("Slice", "s", SLICE),
        # So the manager is gone before it when the host goes down, and does not take that for a failure of the machine's.
        *("Before", "as", "1", _MANAGER),
        *("PIDs", "au", "1", str(process.pid)),
        *("CPUQuotaPerSecUSec", "t", str(limits.processors * _SECOND_MICROSECONDS)),
        *("MemoryMax", "t", str(limits.memory_bytes)),
        *("TasksMax", "t", str(limits.tasks)),
        # What was killed for its memory leaves no unit behind either.
        *("CollectMode", "s", "inactive-or-failed"),
        "0",
    ]
    try:
        await command.run(words, timeout_seconds=_MOVE_SECONDS, package_hint="systemd")
        async with asyncio.timeout(_MOVE_SECONDS):
            while not _is_in(process, scope):
                if not processes.is_alive(process):
                    raise HostError(f"the machine {name} ended before it was confined", code="scope_not_made")
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)
    except (CommandError, TimeoutError) as error:
        raise HostError(
            f"systemd does not move the machine {name} to a scope of its own: {error or 'it takes too long'}",
            code="scope_not_made",
            hint=f"systemctl status {scope}",
        ) from error


def _is_in(process: ProcessIdentity, scope: str) -> bool:
    try:
        lines = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return False
    return processes.is_alive(process) and any(line.endswith(f"/{SLICE}/{scope}") for line in lines)
