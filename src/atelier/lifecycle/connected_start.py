"""Starts a machine with its network card's other end, as its VMM driver wants to have it. Used by ``sandbox_steps``."""

from __future__ import annotations

from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.model.machine import MachineSpec, ProcessIdentity


async def start_connected(vmm: VmmDriver, network: NetworkDriver, spec: MachineSpec) -> ProcessIdentity:
    """Raises as ``NetworkDriver.opened`` and ``VmmDriver.ensure_started``."""
    if vmm.opens_network:
        # A TAP has one holder.
        return await vmm.ensure_started(spec)
    async with network.opened(spec.sandbox_id) as descriptor:
        return await vmm.ensure_started(spec, descriptor)
