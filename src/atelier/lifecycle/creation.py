"""How sandboxes begin: rows and sagas in one transaction, or one that waits in a warm pool gets a name.

Used by ``sandboxes``, whose ``start_create`` and ``start_creates`` these are. What comes after is the sagas' work.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

from atelier.db.engine import Connection, Database
from atelier.db.sandbox_networks import SandboxNetworkRepository
from atelier.db.sandboxes import GuestSecrets, SandboxRepository
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.lifecycle import sandbox_claim, sandbox_create
from atelier.lifecycle.admission import HostRoom, Wish, check_admission
from atelier.lifecycle.background import BackgroundTasks
from atelier.lifecycle.network_policies import NetworkPolicies
from atelier.lifecycle.sandbox_create import create_saga_id
from atelier.lifecycle.snapshots import Snapshots
from atelier.lifecycle.transitions import Transitions
from atelier.lifecycle.warm_pools import WarmPools
from atelier.model.errors import CapacityError, InvalidRequestError
from atelier.model.ids import new_sandbox_id
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy
from atelier.model.sandbox import Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.states import SandboxState
from atelier.saga.executor import Executor


class Creation:
    """``go_on(sandbox_id, saga_id)`` runs a saga that was written; ``destroy_pooled`` returns when nothing of a sandbox
    is left, and raises ConflictError where it is in no pool any more."""

    def __init__(
        self,
        *,
        database: Database,
        executor: Executor[Connection],
        transitions: Transitions,
        images: ImageDriver,
        network: NetworkDriver,
        network_policies: NetworkPolicies,
        snapshots: Snapshots,
        room: HostRoom,
        background: BackgroundTasks,
        host_id: str,
        now: Callable[[], datetime],
        go_on: Callable[[str, str], None],
        destroy_pooled: Callable[[str], Awaitable[None]],
    ) -> None:
        self._database = database
        self._executor = executor
        self._transitions = transitions
        self._network = network
        self._network_policies = network_policies
        self._snapshots = snapshots
        self._room = room
        self._background = background
        self._host_id = host_id
        self._now = now
        self._go_on = go_on
        self._sandboxes = SandboxRepository()
        self.warm_pools = WarmPools(
            database=database,
            host_id=host_id,
            images=images,
            transitions=transitions,
            now=now,
            create=self.start_create,
            destroy=destroy_pooled,
        )

    async def start_create(
        self,
        name: str,
        spec: SandboxSpec,
        policy: NetworkPolicy = OPEN_POLICY,
        *,
        snapshot_id: str | None = None,
        disk_only: bool = False,
        purpose: SandboxPurpose = SandboxPurpose.USER,
    ) -> Sandbox:
        """Write the row and the saga in one transaction, begin, and return the row in state ``creating``.
        ``snapshot_id``: it goes on from there instead of booting; ``spec`` then has the snapshot's sizes, and a disk of
        that size or more. ``disk_only``: it boots, from the snapshot's disk.

        Raises ConflictError (``name_taken``, ``snapshot_not_ready``), NotFoundError (``snapshot_not_found``),
        CapacityError, InvalidRequestError (``expiry_in_past``), PreconditionError (``network_closed``).
        """
        if snapshot_id is None and purpose is SandboxPurpose.USER and (pooled := await self._claim(name, spec, policy)):
            return pooled
        (sandbox,) = await self.start_creates(
            [(name, spec)], policy, snapshot_id=snapshot_id, disk_only=disk_only, purpose=purpose
        )
        return sandbox

    async def _claim(self, name: str, spec: SandboxSpec, policy: NetworkPolicy) -> Sandbox | None:
        """One that waits in a warm pool, as if it had been created just now; None where there is none."""
        check_expiry(spec, self._now())
        offered = await self.warm_pools.offer(spec, policy)
        if offered is None:
            return None

        def take(connection: Connection) -> Sandbox | None:
            sandbox = self.warm_pools.take(connection, name, offered)
            if sandbox is not None:
                saga_id = f"{sandbox_claim.KIND}/{sandbox.id}"
                self._executor.insert(connection, sandbox_claim.KIND, saga_id, sandbox.id)
            return sandbox

        async def begin() -> Sandbox | None:
            sandbox = await self._database.write(take)
            if sandbox is not None:
                self._go_on(sandbox.id, f"{sandbox_claim.KIND}/{sandbox.id}")
                self._background.spawn(self.warm_pools.refill(), "fill the warm pools")
            return sandbox

        return await self._background.unless_interrupted(begin())

    async def start_creates(
        self,
        wanted: Sequence[tuple[str, SandboxSpec]],
        policy: NetworkPolicy = OPEN_POLICY,
        *,
        snapshot_id: str | None = None,
        disk_only: bool = False,
        purpose: SandboxPurpose = SandboxPurpose.USER,
    ) -> list[Sandbox]:
        """Several, or none: ``wanted`` are names and specs. Raises what ``start_create`` raises; CapacityError says how
        many would fit."""
        for _, spec in wanted:
            check_expiry(spec, self._now())
        self._network_policies.check(policy)
        now = self._now()
        rows = [
            Sandbox(
                id=new_sandbox_id(),
                name=name,
                host_id=self._host_id,
                state=SandboxState.CREATING,
                spec=spec,
                created_at=now,
                updated_at=now,
                snapshot_id=snapshot_id,
                disk_only=disk_only,
                purpose=purpose,
            )
            for name, spec in wanted
        ]
        wishes = [Wish.new(sandbox.spec) for sandbox in rows]

        def insert(connection: Connection) -> None:
            if snapshot_id is not None:
                self._snapshots.check_ready(connection, snapshot_id)
            usage = self._sandboxes.sum_usage(connection, self._host_id)
            check_admission(capacity, usage, *wishes)
            for sandbox in rows:
                own = GuestSecrets(token=secrets.token_hex(32), machine_id=secrets.token_hex(16))
                self._transitions.begin(connection, sandbox, own)
                SandboxNetworkRepository().set_policy(connection, sandbox.id, policy, is_pending=False)
                self._sandboxes.take_lease(connection, sandbox.id, self._network.slot_count)
                self._executor.insert(connection, sandbox_create.KIND, create_saga_id(sandbox.id), sandbox.id)

        async def begin() -> None:
            await self._database.write(insert)
            for sandbox in rows:
                self._go_on(sandbox.id, create_saga_id(sandbox.id))

        while True:
            capacity = await self._room.measure()
            try:
                await self._background.unless_interrupted(begin())
            except CapacityError:
                if purpose is SandboxPurpose.POOL or not await self.make_room(*wishes):
                    raise
            else:
                return rows

    async def check_room(self, specs: Sequence[SandboxSpec]) -> None:
        """Raise CapacityError, which says how many would fit, where ``start_creates`` would; nothing is promised."""
        wishes = [Wish.new(spec) for spec in specs]
        while True:
            try:
                return await self._room.check(*wishes)
            except CapacityError:
                if not await self.make_room(*wishes):
                    raise

    async def make_room(self, *wishes: Wish) -> bool:
        """What only waits in a pool gives way to what is asked for, one a call; False where that would not help."""
        capacity = await self._room.measure()
        with self._database.read() as connection:
            usage = self._sandboxes.sum_usage(connection, self._host_id, without=SandboxPurpose.POOL)
        try:
            check_admission(capacity, usage, *wishes)
        except CapacityError:
            return False
        return await self.warm_pools.give_way()


def check_expiry(spec: SandboxSpec, now: datetime) -> None:
    """Raises InvalidRequestError (``expiry_in_past``)."""
    if spec.expires_at is not None and spec.expires_at <= now:
        raise InvalidRequestError(
            f"the sandbox cannot expire at {spec.expires_at.isoformat()}: that is in the past",
            code="expiry_in_past",
            hint="give a time that is still to come",
        )
