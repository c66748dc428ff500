"""Has a QEMU machine moved out of the manager's unit and limited, by the privileged helper program.

Called by the QEMU driver of a production host.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Protocol

from atelier.drivers.vmm.asked_jails import Asking
from atelier.model.machine import ProcessIdentity
from atelier.model.machine_limits import ProcessorAndMemoryLimits


class Confinement(Protocol):
    async def confine(self, sandbox_id: str, process: ProcessIdentity, limits: ProcessorAndMemoryLimits) -> None:
        """Return once the limits hold; at once where they do already.

        Raises HostError (``scope_not_made``, ``process_refused`` for what is no machine of this installation's).
        """
        ...


class AskedConfinement:
    def __init__(self, helper: Asking) -> None:
        self._helper = helper

    async def confine(self, sandbox_id: str, process: ProcessIdentity, limits: ProcessorAndMemoryLimits) -> None:
        await self._helper.ask("confine", sandbox_id=sandbox_id, process=asdict(process), limits=asdict(limits))
