"""QEMU's own user-mode network, closed: the guest has a network card, and nothing answers on it but QEMU itself.

Chosen by ``manager.wiring`` where no bridge can be had. It holds nothing on the host, so a slot is only words.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from atelier.drivers.network.addresses import mac_address_of
from atelier.model.machine import NetworkAttachment
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy, NetworkUsage


class UserNetwork:
    @property
    def name(self) -> str:
        return "closed"

    @property
    def attachment_kind(self) -> str:
        return "user_restricted"

    @property
    def slot_count(self) -> int | None:
        return None

    @property
    def enforces_policies(self) -> bool:
        return False

    async def ensure_slot(self, sandbox_id: str, lease: int, policy: NetworkPolicy = OPEN_POLICY) -> NetworkAttachment:
        """Nothing passes, whatever the policy allows."""
        return NetworkAttachment("user_restricted", mac_address_of(sandbox_id))

    async def ensure_slot_absent(self, sandbox_id: str) -> None:
        """There is nothing to give back: the network ends with the VMM."""

    async def set_policy(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        """Nothing passes, whatever the policy allows."""

    async def read_usage(self) -> dict[str, NetworkUsage]:
        return {}

    @asynccontextmanager
    async def opened(self, sandbox_id: str) -> AsyncGenerator[int | None]:
        yield None

    async def list_slots(self) -> list[str]:
        return []
