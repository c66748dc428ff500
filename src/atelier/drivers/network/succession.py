"""The network that was chosen, beside the one that was there before: machines that run keep what they have, and what is
started from now on gets the new one.

Chosen by ``manager.wiring`` where a former network still stands.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from atelier.drivers.network.interface import NetworkDriver
from atelier.model.machine import NetworkAttachment
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy, NetworkUsage


class SucceededNetwork:
    """``present`` gives all new slots; those of ``former`` are only used on and taken back."""

    def __init__(self, present: NetworkDriver, former: NetworkDriver) -> None:
        self._present = present
        self._former = former

    @property
    def name(self) -> str:
        return self._present.name

    @property
    def attachment_kind(self) -> str:
        return self._present.attachment_kind

    @property
    def slot_count(self) -> int | None:
        return self._present.slot_count

    @property
    def enforces_policies(self) -> bool:
        return self._present.enforces_policies

    async def ensure_slot(self, sandbox_id: str, lease: int, policy: NetworkPolicy = OPEN_POLICY) -> NetworkAttachment:
        """Who asks is about to start a machine: it has none that uses the former slot."""
        await self._former.ensure_slot_absent(sandbox_id)
        return await self._present.ensure_slot(sandbox_id, lease, policy)

    async def ensure_slot_absent(self, sandbox_id: str) -> None:
        await self._former.ensure_slot_absent(sandbox_id)
        await self._present.ensure_slot_absent(sandbox_id)

    async def set_policy(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        await (await self._holder_of(sandbox_id)).set_policy(sandbox_id, policy)

    async def read_usage(self) -> dict[str, NetworkUsage]:
        return await self._former.read_usage() | await self._present.read_usage()

    @asynccontextmanager
    async def opened(self, sandbox_id: str) -> AsyncGenerator[int | None]:
        async with (await self._holder_of(sandbox_id)).opened(sandbox_id) as descriptor:
            yield descriptor

    async def list_slots(self) -> list[str]:
        return sorted({*await self._former.list_slots(), *await self._present.list_slots()})

    async def _holder_of(self, sandbox_id: str) -> NetworkDriver:
        return self._former if sandbox_id in await self._former.list_slots() else self._present
