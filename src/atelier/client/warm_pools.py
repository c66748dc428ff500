"""``WarmPool`` (blocking) and ``AsyncWarmPool`` (asyncio): sandboxes that stand ready to be taken.

::

    from atelier import WarmPool

    WarmPool.set("base", 5)              # a create of the usual size takes one of them
    WarmPool.drain("base")
"""

from __future__ import annotations

import builtins

from atelier.client import warm_pool_calls
from atelier.client.connection import AsyncConnection, AsyncConnectionLease, Connection, ConnectionLease
from atelier.client.environment import endpoint_of
from atelier.schemas.warm_pools import WarmPool as WarmPoolDetails


class WarmPool:
    @staticmethod
    def list(
        *, api_url: str = "", api_key: str = "", connection: Connection | None = None
    ) -> builtins.list[WarmPoolDetails]:
        """What pools there are, and how many sandboxes of each are ready."""
        lease = ConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        try:
            return (lease.connection.send(warm_pool_calls.list_warm_pools())).items
        finally:
            lease.close()

    @staticmethod
    def set(
        image: str,
        size: int,
        *,
        vcpu_count: int | None = None,
        memory_mib: int | None = None,
        api_url: str = "",
        api_key: str = "",
        connection: Connection | None = None,
    ) -> WarmPoolDetails:
        """Have ``size`` sandboxes of ``image`` stand ready; 0 drains this pool. Returns when those that are short are
        begun. Raises NotFoundError (``image_not_found``), InvalidRequestError."""
        lease = ConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        call = warm_pool_calls.set_warm_pool(image, size=size, vcpu_count=vcpu_count, memory_mib=memory_mib)
        try:
            return lease.connection.send(call)
        finally:
            lease.close()

    @staticmethod
    def drain(image: str, *, api_url: str = "", api_key: str = "", connection: Connection | None = None) -> None:
        """Give up all pools of ``image``; returns when none of their sandboxes is left. Raises NotFoundError
        (``warm_pool_not_found``)."""
        lease = ConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        try:
            lease.connection.send(warm_pool_calls.drain_warm_pools(image))
        finally:
            lease.close()


class AsyncWarmPool:
    @staticmethod
    async def list(
        *, api_url: str = "", api_key: str = "", connection: AsyncConnection | None = None
    ) -> builtins.list[WarmPoolDetails]:
        """See ``WarmPool.list``."""
        lease = AsyncConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        try:
            return (await lease.connection.send(warm_pool_calls.list_warm_pools())).items
        finally:
            await lease.close()

    @staticmethod
    async def set(
        image: str,
        size: int,
        *,
        vcpu_count: int | None = None,
        memory_mib: int | None = None,
        api_url: str = "",
        api_key: str = "",
        connection: AsyncConnection | None = None,
    ) -> WarmPoolDetails:
        """See ``WarmPool.set``."""
        lease = AsyncConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        call = warm_pool_calls.set_warm_pool(image, size=size, vcpu_count=vcpu_count, memory_mib=memory_mib)
        try:
            return await lease.connection.send(call)
        finally:
            await lease.close()

    @staticmethod
    async def drain(
        image: str, *, api_url: str = "", api_key: str = "", connection: AsyncConnection | None = None
    ) -> None:
        """See ``WarmPool.drain``."""
        lease = AsyncConnectionLease(endpoint_of(connection, api_url, api_key), connection)
        try:
            await lease.connection.send(warm_pool_calls.drain_warm_pools(image))
        finally:
            await lease.close()
