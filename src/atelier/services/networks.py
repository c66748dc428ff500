"""The networks of sandboxes: what they may reach, what has passed, and the figures of all of them for monitoring."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from atelier.db.engine import Database
from atelier.db.sandbox_networks import SandboxNetworkRepository
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.network.interface import NetworkDriver
from atelier.lifecycle.network_policies import NetworkPolicies
from atelier.model.errors import AtelierError
from atelier.model.network_policy import NetworkPolicy, NetworkUsage
from atelier.model.states import SandboxState

logger = logging.getLogger(__name__)

_USAGE_SECONDS = 5.0
"""How long the network driver may take to read its counters."""
_NO_WAY_OUT = "the sandboxes of this host have no way out; atelier doctor says what is missing for one"


@dataclass(frozen=True, slots=True)
class NetworkState:
    """``not_connected_reason``: empty where packets can get out. ``usage`` None: no slot, or unreadable now."""

    policy: NetworkPolicy
    is_in_force: bool
    not_connected_reason: str
    address: str
    gateway: str
    usage: NetworkUsage | None


@dataclass(frozen=True, slots=True)
class HostFigures:
    """``usage`` by sandbox id; empty when it could not be read. ``failed_reads``: how often it could not, since the
    manager's start."""

    sandboxes: dict[SandboxState, int]
    usage: dict[str, NetworkUsage]
    failed_reads: int


class NetworkService:
    def __init__(self, database: Database, driver: NetworkDriver, policies: NetworkPolicies) -> None:
        self._database = database
        self._sandboxes = SandboxRepository()
        self._networks = SandboxNetworkRepository()
        self._driver = driver
        self._policies = policies
        self._failed_reads = 0

    async def get(self, reference: str) -> NetworkState:
        """By id or name. Raises NotFoundError (``sandbox_not_found``)."""
        with self._database.read() as connection:
            sandbox_id = self._sandboxes.get(connection, reference).id
            stored = self._networks.get(connection, sandbox_id)
        usage = await self._read_usage()
        return NetworkState(
            policy=stored.policy,
            is_in_force=self._policies.is_in_force(sandbox_id, is_pending=stored.is_pending),
            not_connected_reason="" if self._driver.enforces_policies else _NO_WAY_OUT,
            address=stored.address,
            gateway=stored.gateway,
            usage=usage.get(sandbox_id) if usage is not None else None,
        )

    async def change(self, reference: str, edit: Callable[[NetworkPolicy], NetworkPolicy]) -> NetworkState:
        """``edit`` makes the new policy from the present one. Returns when it is in force.

        Raises NotFoundError, ConflictError (``invalid_state``), PreconditionError (``network_closed``), what ``edit``
        raises; TransientError (``network_policy_pending``) when it is stored and not in force yet.
        """
        with self._database.read() as connection:
            sandbox_id = self._sandboxes.get(connection, reference).id
        await self._policies.change(sandbox_id, edit)
        return await self.get(sandbox_id)

    async def measure(self) -> HostFigures:
        """For monitoring: never fails for the network's sake."""
        with self._database.read() as connection:
            sandboxes = self._sandboxes.count_by_state(connection)
        usage = await self._read_usage()
        if usage is None:
            self._failed_reads += 1
        return HostFigures(sandboxes, usage or {}, self._failed_reads)

    async def _read_usage(self) -> dict[str, NetworkUsage] | None:
        try:
            async with asyncio.timeout(_USAGE_SECONDS):
                return await self._driver.read_usage()
        except (AtelierError, TimeoutError) as error:
            logger.warning("the network's counters cannot be read: %s", error or "in time")
            return None
