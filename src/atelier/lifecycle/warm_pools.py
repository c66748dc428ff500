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
from atelier.drivers.images.interface import ImageDriver
from atelier.lifecycle.templates import CreateSandbox
from atelier.lifecycle.transitions import Failure, Transitions
from atelier.model.errors import AtelierError, CapacityError, ConflictError, NotFoundError
from atelier.model.ids import new_id
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy
from atelier.model.sandbox import DEFAULT_DISK_MIB, Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.states import SandboxState
from atelier.model.warm_pool import WarmPool

_logger = logging.getLogger(__name__)

_REFILL_AFTER_SECONDS = 1.0
_COMING = (SandboxState.CREATING, SandboxState.RUNNING)


@dataclass(frozen=True, slots=True)
class PoolState:
    """``ready`` wait to be taken; ``coming`` are being made. ``trouble``: why there are not more, where that is known."""

    pool: WarmPool
    ready: int
    coming: int
    trouble: Failure | None


class WarmPools:
    """``create`` begins to make one; ``destroy`` returns when nothing of one is left, and raises ConflictError where it
    was taken meanwhile."""

    def __init__(
        self,
        *,
        database: Database,
        host_id: str,
        images: ImageDriver,
        transitions: Transitions,
        now: Callable[[], datetime],
        create: CreateSandbox,
        destroy: Callable[[str], Awaitable[None]],
    ) -> None:
        self._database = database
        self._host_id = host_id
        self._images = images
        self._transitions = transitions
        self._now = now
        self._create = create
        self._destroy = destroy
        self._sandboxes = SandboxRepository()
        self._pools = WarmPoolRepository()
        self._keeping = asyncio.Lock()
        self._trouble: dict[tuple[str, int, int], Failure] = {}
        self._is_closed = False

    def list_states(self) -> list[PoolState]:
        with self._database.read() as connection:
            return [self._look(connection, pool) for pool in self._pools.list_all(connection)]

    async def set_size(self, pool: WarmPool) -> PoolState:
        """From now on: what is short is begun, what is too much is gone when this returns. 0 drains."""
        await self._database.write(lambda connection: self._pools.put(connection, pool))
        await self.keep()
        with self._database.read() as connection:
            return self._look(connection, pool)

    async def offer(self, spec: SandboxSpec, policy: NetworkPolicy) -> SandboxSpec | None:
        """``spec`` with the image that sandboxes have now, for ``take``; None where none waits that fits. A look without
        a write, so that creates without pools cost none."""
        if policy != OPEN_POLICY or spec.disk_mib != DEFAULT_DISK_MIB:
            return None
        with self._database.read() as connection:
            if self._find_ready(connection, spec) is None:
                return None
        return replace(spec, image_id=await self._find_image_id(spec.image))

    def take(self, connection: Connection, name: str, spec: SandboxSpec) -> Sandbox | None:
        """Take one that is ready out of the pool that fits what was offered, in the caller's transaction; None where
        there is none any more. Its row is then in state ``creating``. Raises ConflictError (``name_taken``)."""
        ready = self._find_ready(connection, spec)
        if ready is None:
            return None
        self._sandboxes.give_away(connection, ready.id, name, spec, self._now())
        return self._transitions.apply(connection, ready.id, SandboxState.CREATING)

    def close(self) -> None:
        """Fill no more: the sandboxes of this host are about to be stopped or destroyed."""
        self._is_closed = True

    async def keep(self) -> None:
        """Free what is too much or has an older image, fill what is short. The body of a background loop."""
        async with self._keeping:
            if not self._is_closed:
                await self._keep()

    async def refill(self) -> None:
        """``keep``, a moment after one was taken: whoever took it is about to use it, and a machine that comes up beside
        it would take its time."""
        await asyncio.sleep(_REFILL_AFTER_SECONDS)
        await self.keep()

    async def give_way(self) -> bool:
        """Free the room of one that waits, or is about to, for somebody who asks for it; False where there is none."""
        for sandbox in reversed(self._list_pooled()):
            if await self._try_destroy(sandbox):
                return True
        return False

    async def _keep(self) -> None:
        with self._database.read() as connection:
            pools = self._pools.list_all(connection)
        image_ids = {image: await self._find_image_id(image) for image in {pool.image for pool in pools}}
        everything = self._list_pooled()
        short: list[tuple[WarmPool, int]] = []
        wanted: set[str] = set()
        for pool in pools:
            fitting = [each for each in everything if _fits(each, pool, image_ids[pool.image])]
            wanted.update(each.id for each in fitting[: pool.size])
            short.append((pool, pool.size - len(fitting)))
        self._trouble = {key: self._trouble[key] for key in map(_key, pools) if key in self._trouble}
        spent = [each for each in everything if each.id not in wanted and each.state is not SandboxState.DESTROYING]
        for each in spent:
            if each.state is SandboxState.FAILED:
                self._trouble[_key_of(each)] = Failure(each.failure_code, each.failure_message, each.failure_hint)
                _logger.warning("a sandbox for the warm pool of %s failed: %s", each.spec.image, each.failure_message)
        await asyncio.gather(*(self._try_destroy(each) for each in spent))
        for pool, missing in short:
            await self._fill(pool, missing)

    async def _fill(self, pool: WarmPool, missing: int) -> None:
        spec = SandboxSpec(image=pool.image, vcpu_count=pool.vcpu_count, memory_mib=pool.memory_mib)
        for _ in range(missing):
            if self._is_closed:
                return
            try:
                await self._create(f"pool-{new_id(8)}", spec, purpose=SandboxPurpose.POOL)
            except AtelierError as error:
                self._trouble[_key(pool)] = Failure(error.code, error.message, error.hint)
                level = logging.INFO if isinstance(error, CapacityError) else logging.WARNING
                _logger.log(level, "the warm pool of %s stays short: %s", pool.image, error)
                return

    async def _try_destroy(self, sandbox: Sandbox) -> bool:
        try:
            await self._destroy(sandbox.id)
        except (ConflictError, NotFoundError):  # taken, or gone meanwhile
            return False
        except AtelierError as error:
            _logger.warning("%s of a warm pool stays for now: %s", sandbox.name, error)
            return False
        return True

    async def _find_image_id(self, image: str) -> str:
        """Empty where that cannot be told without building it: then those that there are are as good as any."""
        try:
            found = await self._images.find_image(image)
        except NotFoundError:
            return ""
        return found.id if found is not None else ""

    def _find_ready(self, connection: Connection, spec: SandboxSpec) -> Sandbox | None:
        waiting = self._find(connection, WarmPool(spec.image, spec.vcpu_count, spec.memory_mib, 0))
        ready = (each for each in waiting if each.state is SandboxState.RUNNING)
        return next((each for each in ready if spec.image_id in ("", each.spec.image_id)), None)

    def _look(self, connection: Connection, pool: WarmPool) -> PoolState:
        states = [each.state for each in self._find(connection, pool)]
        ready, coming = states.count(SandboxState.RUNNING), states.count(SandboxState.CREATING)
        return PoolState(pool, ready, coming, self._trouble.get(_key(pool)) if ready < pool.size else None)

    def _find(self, connection: Connection, pool: WarmPool) -> list[Sandbox]:
        return self._sandboxes.find_pooled(connection, self._host_id, pool.image, pool.vcpu_count, pool.memory_mib)

    def _list_pooled(self) -> list[Sandbox]:
        with self._database.read() as connection:
            rows = self._sandboxes.list_in(connection)
        return [each for each in rows if each.purpose is SandboxPurpose.POOL and each.host_id == self._host_id]


def _key(pool: WarmPool) -> tuple[str, int, int]:
    return pool.image, pool.vcpu_count, pool.memory_mib


def _key_of(sandbox: Sandbox) -> tuple[str, int, int]:
    return sandbox.spec.image, sandbox.spec.vcpu_count, sandbox.spec.memory_mib


def _fits(sandbox: Sandbox, pool: WarmPool, image_id: str) -> bool:
    """``image_id`` empty: any. One that is being made may not know its image yet."""
    is_of_image = not image_id or sandbox.spec.image_id in ("", image_id)
    return _key_of(sandbox) == _key(pool) and sandbox.state in _COMING and is_of_image
