"""What the table of sandboxes knows of their network: policy, lease, addresses. Called by ``lifecycle`` and ``services``.

Apart from ``SandboxRepository``, whose rows are read by the hundred: a policy may have a thousand entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, select, update

from atelier.db.tables import sandboxes
from atelier.model.errors import NotFoundError
from atelier.model.machine import GuestAddress
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy
from atelier.model.states import SandboxState


@dataclass(frozen=True, slots=True)
class SandboxNetwork:
    """``is_pending``: the policy is written down, and perhaps not in force yet. ``lease``: its network slot; None: it has
    none. ``address`` and ``gateway`` are the guest's, in text; empty where its slot has none."""

    policy: NetworkPolicy
    is_pending: bool
    lease: int | None
    address: str
    gateway: str


_FIND = select(
    sandboxes.c.network_policy,
    sandboxes.c.network_pending,
    sandboxes.c.network_lease,
    sandboxes.c.network_address,
    sandboxes.c.network_gateway,
).where(sandboxes.c.id == bindparam("sandbox_id"))
_UPDATE = update(sandboxes).where(sandboxes.c.id == bindparam("sandbox_id"))


class SandboxNetworkRepository:
    """Stateless: everything stands in the table. All methods work in the caller's transaction."""

    def get(self, connection: Connection, sandbox_id: str) -> SandboxNetwork:
        """Raises NotFoundError (``sandbox_not_found``)."""
        row = connection.execute(_FIND, {"sandbox_id": sandbox_id}).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no sandbox {sandbox_id!r}", code="sandbox_not_found")
        return SandboxNetwork(
            policy=OPEN_POLICY if row.network_policy is None else NetworkPolicy.from_json(row.network_policy),
            is_pending=row.network_pending,
            lease=row.network_lease,
            address=row.network_address or "",
            gateway=row.network_gateway or "",
        )

    def set_policy(self, connection: Connection, sandbox_id: str, policy: NetworkPolicy, *, is_pending: bool) -> None:
        stored = None if policy == OPEN_POLICY else policy.to_json()
        values = {"sandbox_id": sandbox_id, "network_policy": stored, "network_pending": is_pending}
        connection.execute(_UPDATE, values)

    def mark_in_force(self, connection: Connection, sandbox_id: str) -> None:
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "network_pending": False})

    def set_address(self, connection: Connection, sandbox_id: str, guest: GuestAddress | None) -> None:
        address, gateway = (None, None) if guest is None else (guest.address, guest.gateway)
        values = {"sandbox_id": sandbox_id, "network_address": address, "network_gateway": gateway}
        connection.execute(_UPDATE, values)

    def list_pending(self, connection: Connection) -> list[str]:
        """Ids of the sandboxes whose policy is perhaps not in force; what is being destroyed needs none any more."""
        query = select(sandboxes.c.id).where(
            sandboxes.c.network_pending, sandboxes.c.state != SandboxState.DESTROYING.value
        )
        return list(connection.execute(query).scalars())

    def list_leased(self, connection: Connection) -> list[str]:
        """Ids of the sandboxes that have a network slot, or are about to."""
        return list(connection.execute(select(sandboxes.c.id).where(sandboxes.c.network_lease.is_not(None))).scalars())
