"""Interface of the network drivers: one slot per sandbox."""

from __future__ import annotations

from typing import Protocol

from atelier.model.machine import NetworkAttachment


class NetworkDriver(Protocol):
    """Gives a sandbox its network card's other end, and takes it back."""

    @property
    def name(self) -> str: ...

    async def ensure_slot(self, sandbox_id: str) -> NetworkAttachment:
        """The sandbox's slot; the same answer each time it is asked for."""
        ...

    async def ensure_slot_absent(self, sandbox_id: str) -> None: ...

    async def list_slots(self) -> list[str]:
        """Sandbox ids of this installation that hold something on this host, sorted."""
        ...
