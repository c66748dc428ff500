"""Warm pools: sandboxes made ahead of time, network and keys set, so that a create only gives one a name.

Used by ``sandboxes`` (a create takes one in its own transaction), by ``services/warm_pools.py`` and by a background loop,
which fills and drains. What waits in a pool counts against the host like any sandbox: a pool is filled within the limits
that all creates have, and is the first to give way when somebody else needs the room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime

from atelier.db.engine import Connection, Database
from atelier.db.sandboxes import SandboxRepository
from atelier.db.warm_pools import WarmPoolRepository
from atelier.lifecycle.templates import CreateSandbox
from atelier.lifecycle.transitions import Transitions
from atelier.model.errors import AtelierError, CapacityError
from atelier.model.ids import new_id
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy
from atelier.model.sandbox import DEFAULT_DISK_MIB, Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.states import SandboxState
from atelier.model.warm_pool import WarmPool

_logger = logging.getLogger(__name__)

_COMING = (SandboxState.CREATING, SandboxState.RUNNING)


@dataclass(frozen=True, slots=True)
class PoolState:
    """``ready`` wait to be taken; ``coming`` are being made."""

    pool: WarmPool
    ready: int
    coming: int


class WarmPools:
    """``create`` begins to make one; ``destroy`` returns when nothing of one is left."""

    def __init__(
        self,
        *,
        database: Database,
        host_id: str,
        transitions: Transitions,
        now: Callable[[], datetime],
        create: CreateSandbox,
        destroy: Callable[[str], Awaitable[None]],
    ) -> None:
        self._database = database
        self._host_id = host_id
        self._transitions = transitions
        self._now = now
        self._create = create
        self._destroy = destroy
        self._sandboxes = SandboxRepository()
        self._pools = WarmPoolRepository()
        self._keeping = asyncio.Lock()

    def list_states(self) -> list[PoolState]:
        with self._database.read() as connection:
            return [self._look(connection, pool) for pool in self._pools.list_all(connection)]

    async def set_size(self, pool: WarmPool) -> PoolState:
        """From now on; the loop sees to it, and is asked to at once. 0 drains."""
        await self._database.write(lambda connection: self._pools.put(connection, pool))
        await self.keep()
        with self._database.read() as connection:
            return self._look(connection, pool)

    def may_have(self, spec: SandboxSpec, policy: NetworkPolicy) -> bool:
        """A look without a write, so that creates without pools cost none."""
        with self._database.read() as connection:
            return self._find_ready(connection, spec, policy) is not None

    def take(self, connection: Connection, name: str, spec: SandboxSpec, policy: NetworkPolicy) -> Sandbox | None:
        """Take one that is ready out of the pool that fits, in the caller's transaction; None where there is none. Its row
        is then in state ``creating``. Raises ConflictError (``name_taken``)."""
        ready = self._find_ready(connection, spec, policy)
        if ready is None:
            return None
        self._sandboxes.give_away(connection, ready.id, name, spec, self._now())
        return self._transitions.apply(connection, ready.id, SandboxState.CREATING)

    async def keep(self) -> None:
        """Fill what is short, free what is too much. The body of a background loop."""
        async with self._keeping:
            await self._keep()

    async def _keep(self) -> None:
        with self._database.read() as connection:
            pools = self._pools.list_all(connection)
            everything = [
                each
                for each in self._sandboxes.list_in(connection)
                if each.purpose is SandboxPurpose.POOL and each.host_id == self._host_id
            ]
        wanted: set[str] = set()
        for pool in pools:
            fitting = [each for each in everything if _fits(each, pool) and each.state in _COMING]
            wanted.update(each.id for each in fitting[: pool.size])
            await self._fill(pool, pool.size - len(fitting))
        for sandbox in everything:
            if sandbox.id not in wanted and sandbox.state is not SandboxState.DESTROYING:
                await self._try_destroy(sandbox)

    async def give_way(self) -> bool:
        """Free the room of one that waits, for somebody who asks for it; False where none waits."""
        with self._database.read() as connection:
            rows = self._sandboxes.list_in(connection, [SandboxState.RUNNING])
        for sandbox in rows:
            if sandbox.purpose is SandboxPurpose.POOL:
                await self._destroy(sandbox.id)
                return True
        return False

    async def _fill(self, pool: WarmPool, missing: int) -> None:
        spec = SandboxSpec(image=pool.image, vcpu_count=pool.vcpu_count, memory_mib=pool.memory_mib)
        for _ in range(missing):
            try:
                await self._create(f"pool-{new_id(8)}", spec, purpose=SandboxPurpose.POOL)
            except CapacityError as error:
                _logger.info("the warm pool of %s stays short: %s", pool.image, error)
                return
            except AtelierError as error:
                _logger.warning("the warm pool of %s cannot be filled: %s", pool.image, error)
                return

    async def _try_destroy(self, sandbox: Sandbox) -> None:
        try:
            await self._destroy(sandbox.id)
        except AtelierError as error:
            _logger.warning("%s of a warm pool stays for now: %s", sandbox.name, error)

    def _find_ready(self, connection: Connection, spec: SandboxSpec, policy: NetworkPolicy) -> Sandbox | None:
        if policy != OPEN_POLICY or spec.disk_mib != DEFAULT_DISK_MIB:
            return None
        waiting = self._find(connection, WarmPool(spec.image, spec.vcpu_count, spec.memory_mib, 0))
        return next((each for each in waiting if each.state is SandboxState.RUNNING), None)

    def _look(self, connection: Connection, pool: WarmPool) -> PoolState:
        states = [each.state for each in self._find(connection, pool)]
        return PoolState(pool, states.count(SandboxState.RUNNING), states.count(SandboxState.CREATING))

    def _find(self, connection: Connection, pool: WarmPool) -> list[Sandbox]:
        return self._sandboxes.find_pooled(connection, self._host_id, pool.image, pool.vcpu_count, pool.memory_mib)


def _fits(sandbox: Sandbox, pool: WarmPool) -> bool:
    spec = sandbox.spec
    return replace(pool, size=0) == WarmPool(spec.image, spec.vcpu_count, spec.memory_mib, 0)
