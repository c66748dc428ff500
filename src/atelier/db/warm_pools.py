"""The table of warm pools: how many sandboxes are to stand ready. Called by ``lifecycle`` and ``services``."""

from __future__ import annotations

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from atelier.db.tables import warm_pools
from atelier.model.warm_pool import WarmPool


class WarmPoolRepository:
    """Stateless: everything stands in the table. All methods work in the caller's transaction."""

    def list_all(self, connection: Connection) -> list[WarmPool]:
        query = select(warm_pools).order_by(*warm_pools.primary_key.columns)
        return [WarmPool(row.image, row.vcpu_count, row.memory_mib, row.size) for row in connection.execute(query)]

    def delete_of_image(self, connection: Connection, image: str) -> int:
        """How many there were."""
        return connection.execute(delete(warm_pools).where(warm_pools.c.image == image)).rowcount

    def put(self, connection: Connection, pool: WarmPool) -> None:
        """Size 0 takes the row away."""
        key = {"image": pool.image, "vcpu_count": pool.vcpu_count, "memory_mib": pool.memory_mib}
        if pool.size == 0:
            connection.execute(delete(warm_pools).where(*(warm_pools.c[name] == value for name, value in key.items())))
            return
        statement = insert(warm_pools).values(**key, size=pool.size)
        connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_={"size": pool.size}))
