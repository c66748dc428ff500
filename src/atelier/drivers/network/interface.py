"""Interface of the network drivers: one slot per sandbox."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from atelier.model.machine import NetworkAttachment
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy, NetworkUsage


class NetworkDriver(Protocol):
    """Gives a sandbox its network card's other end, and takes it back. ``lease`` numbers the slots of an installation
    from 0; the lifecycle gives each to one sandbox at a time, and the sandbox's addresses follow from it."""

    @property
    def name(self) -> str: ...

    @property
    def attachment_kind(self) -> str:
        """``NetworkAttachment.kind`` of the slots that it gives now."""
        ...

    @property
    def slot_count(self) -> int | None:
        """How many slots there are; None: as many as are asked for."""
        ...

    @property
    def enforces_policies(self) -> bool:
        """False where no sandbox has a way out, whatever its policy says."""
        ...

    async def ensure_slot(self, sandbox_id: str, lease: int, policy: NetworkPolicy = OPEN_POLICY) -> NetworkAttachment:
        """The sandbox's slot; the same answer each time it is asked for with the same lease. The policy is in force
        before the first packet passes."""
        ...

    async def ensure_slot_absent(self, sandbox_id: str) -> None: ...

    async def set_policy(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        """In force when it returns, for open connections too. Raises NotFoundError (``no_network_slot``)."""
        ...

    async def read_usage(self) -> dict[str, NetworkUsage]:
        """By sandbox id; what has no slot is not there."""
        ...

    def opened(self, sandbox_id: str) -> AbstractAsyncContextManager[int | None]:
        """The card's other end as a descriptor for the VMM to inherit, open for as long as the block runs; None where
        the VMM needs none."""
        ...

    async def list_slots(self) -> list[str]:
        """Sandbox ids of this installation that hold something on this host, sorted."""
        ...
