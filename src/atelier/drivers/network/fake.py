"""A network that remembers its slots and connects nothing. For mock mode and tests; faults by ``faults``."""

from __future__ import annotations

from atelier.drivers.faults import Faults
from atelier.drivers.network.addresses import mac_address_of
from atelier.model.machine import NetworkAttachment


class FakeNetwork:
    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.slots: dict[str, NetworkAttachment] = {}

    @property
    def name(self) -> str:
        return "fake"

    async def ensure_slot(self, sandbox_id: str) -> NetworkAttachment:
        await self.faults.before("ensure_slot")
        return self.slots.setdefault(sandbox_id, NetworkAttachment("none", mac_address_of(sandbox_id)))

    async def ensure_slot_absent(self, sandbox_id: str) -> None:
        await self.faults.before("ensure_slot_absent")
        self.slots.pop(sandbox_id, None)

    async def list_slots(self) -> list[str]:
        await self.faults.before("list_slots")
        return sorted(self.slots)
