"""Warm pools: how many sandboxes stand ready, of what kind; change that."""

from __future__ import annotations

from atelier.db.engine import Connection, Database
from atelier.db.warm_pools import WarmPoolRepository
from atelier.drivers.images.interface import ImageDriver
from atelier.lifecycle.warm_pools import PoolState, WarmPools
from atelier.model.errors import InvalidRequestError, NotFoundError
from atelier.model.sandbox import MAX_MEMORY_MIB, MAX_VCPU_COUNT, MIN_MEMORY_MIB, MIN_VCPU_COUNT
from atelier.model.warm_pool import MAX_POOL_SIZE, WarmPool


class WarmPoolService:
    def __init__(self, database: Database, images: ImageDriver, warm_pools: WarmPools) -> None:
        self._database = database
        self._images = images
        self._warm_pools = warm_pools

    def list_pools(self) -> list[PoolState]:
        return self._warm_pools.list_states()

    async def set_size(self, pool: WarmPool) -> PoolState:
        """What is short is begun, what is too much is gone when this returns; size 0 drains.

        Raises InvalidRequestError (``invalid_pool``), NotFoundError (``image_not_found``).
        """
        for what, value, least, most in (
            ("size", pool.size, 0, MAX_POOL_SIZE),
            ("vcpu_count", pool.vcpu_count, MIN_VCPU_COUNT, MAX_VCPU_COUNT),
            ("memory_mib", pool.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB),
        ):
            if not least <= value <= most:
                raise InvalidRequestError(
                    f"a warm pool cannot have the {what} {value}",
                    code="invalid_pool",
                    hint=f"{what} is {least} to {most}",
                )
        recipes = await self._images.list_recipes()
        # A pool whose image has gone can still be drained.
        if pool.size > 0 and pool.image not in recipes:
            raise NotFoundError(
                f"there is no image {pool.image!r}",
                code="image_not_found",
                hint=f"known images: {', '.join(sorted(recipes))}",
            )
        return await self._warm_pools.set_size(pool)

    async def drain(self, image: str) -> None:
        """Give up all pools of an image, whatever their sizes; returns when nothing of them is left. What was taken
        stays. Raises NotFoundError (``warm_pool_not_found``)."""

        def forget(connection: Connection) -> bool:
            return WarmPoolRepository().delete_of_image(connection, image) > 0

        if not await self._database.write(forget):
            raise NotFoundError(
                f"there is no warm pool of {image!r}",
                code="warm_pool_not_found",
                hint="atelier pool ls shows the ones there are",
            )
        await self._warm_pools.keep()
