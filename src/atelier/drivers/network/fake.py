"""A network that remembers its slots and connects nothing. For mock mode and tests; faults by ``faults``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from atelier.drivers.faults import Faults
from atelier.drivers.network.addresses import mac_address_of
from atelier.model.errors import NotFoundError
from atelier.model.machine import NetworkAttachment
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy, NetworkUsage


class FakeNetwork:
    """``slot_count`` bounds nothing here: the leases are the lifecycle's to give."""

    def __init__(self, faults: Faults | None = None, *, slot_count: int | None = None) -> None:
        self.faults = faults or Faults()
        self.slots: dict[str, NetworkAttachment] = {}
        self.leases: dict[str, int] = {}
        self.policies: dict[str, NetworkPolicy] = {}
        self._slot_count = slot_count

    @property
    def name(self) -> str:
        return "fake"

    @property
    def attachment_kind(self) -> str:
        return "none"

    @property
    def slot_count(self) -> int | None:
        return self._slot_count

    @property
    def enforces_policies(self) -> bool:
        return True

    async def ensure_slot(self, sandbox_id: str, lease: int, policy: NetworkPolicy = OPEN_POLICY) -> NetworkAttachment:
        await self.faults.before("ensure_slot")
        self.leases[sandbox_id] = lease
        self.policies[sandbox_id] = policy
        return self.slots.setdefault(sandbox_id, NetworkAttachment("none", mac_address_of(sandbox_id)))

    async def ensure_slot_absent(self, sandbox_id: str) -> None:
        await self.faults.before("ensure_slot_absent")
        self.slots.pop(sandbox_id, None)
        self.leases.pop(sandbox_id, None)
        self.policies.pop(sandbox_id, None)

    async def set_policy(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        await self.faults.before("set_policy")
        if sandbox_id not in self.slots:
            raise NotFoundError(f"sandbox {sandbox_id} has no network slot", code="no_network_slot")
        self.policies[sandbox_id] = policy

    async def read_usage(self) -> dict[str, NetworkUsage]:
        await self.faults.before("read_usage")
        return {sandbox_id: NetworkUsage() for sandbox_id in self.slots}

    @asynccontextmanager
    async def opened(self, sandbox_id: str) -> AsyncGenerator[int | None]:
        await self.faults.before("opened")
        yield None

    async def list_slots(self) -> list[str]:
        await self.faults.before("list_slots")
        return sorted(self.slots)
