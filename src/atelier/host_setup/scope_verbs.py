"""Root's side of what limits a QEMU machine: moves a process of the manager's, and no other, into a scope of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from atelier.drivers.vmm.qemu_arguments import process_name
from atelier.drivers.vmm.qemu_launch import PROGRAM
from atelier.host import machine_scopes, processes
from atelier.host_setup.root_settings import RootSettings
from atelier.model.errors import HostError
from atelier.model.ids import is_sandbox_id
from atelier.model.jail import machine_id
from atelier.model.machine import ProcessIdentity
from atelier.model.machine_limits import ProcessorAndMemoryLimits

Request = dict[str, Any]


class ScopeVerbs:
    def __init__(self, settings: RootSettings) -> None:
        self._settings = settings

    @property
    def verbs(self) -> Mapping[str, Callable[[Request], Awaitable[dict[str, Any]]]]:
        return {"confine": self.confine}

    async def confine(self, request: Request) -> dict[str, Any]:
        """Nothing where the host's services are not systemd's. Raises KeyError, TypeError, ValueError for what is no
        request, HostError (``process_refused``, ``scope_not_made``)."""
        process = ProcessIdentity(**request.pop("process"))
        limits = ProcessorAndMemoryLimits(**request.pop("limits"))
        sandbox_id = str(request.pop("sandbox_id"))
        numbers = (process.pid, limits.processors, limits.memory_bytes, limits.tasks)
        if request or not is_sandbox_id(sandbox_id) or any(type(each) is not int or each < 1 for each in numbers):
            raise ValueError("no machine and its limits")
        installation_id = self._settings.installation_id
        user_id, _ = self._settings.owner
        is_ours = processes.runs(process, PROGRAM, ["-name", process_name(installation_id, sandbox_id)])
        if not is_ours or processes.user_id(process.pid) != user_id:
            raise HostError(
                f"process {process.pid} is no machine of sandbox {sandbox_id}",
                code="process_refused",
                hint="it may have ended; start the sandbox again",
            )
        if machine_scopes.is_possible():
            await machine_scopes.confine(machine_id(installation_id, sandbox_id), process, limits)
        return {}
