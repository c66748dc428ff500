"""The way out of a home that is in the host's own namespace: the host's own links."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import IPv4Network

from atelier.host.netlink import AddressWatch
from atelier.model.address_plan import AddressPlan
from atelier.network_holder.host_router import HostRouter
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.rules import absent_rules
from atelier.network_holder.side import NetworkSide


class HostUplink:
    """``host`` is the namespace in which the holder was started, and where the home is."""

    def __init__(self, names: NetworkNames, host: NetworkSide, addresses: AddressWatch) -> None:
        self._names = names
        self._host = host
        self._addresses = addresses
        self._router = HostRouter(names, host, names.bridge)

    @property
    def link(self) -> None:
        return None

    @property
    def watches(self) -> Sequence[AddressWatch]:
        return [self._addresses]

    def taken_networks(self) -> list[IPv4Network]:
        return self._router.taken_networks()

    def connected_networks(self) -> list[IPv4Network]:
        return self._host.links.connected_networks()

    def own_networks(self) -> list[IPv4Network]:
        return self._host.links.local_networks()

    def require_possible(self) -> None:
        """Raises HostError (``forwarding_off``)."""
        self._router.require_forwarding()

    async def ensure(self, plan: AddressPlan, home: NetworkSide) -> None:
        await self._router.ensure_accepted()

    async def check(self, plan: AddressPlan) -> bool:
        return await self._router.ensure_accepted()

    def problems(self) -> list[str]:
        return self._router.problems()

    async def remove(self) -> None:
        """The home's rules too, which no namespace takes away with it."""
        await self._router.ensure_accepted_absent()
        self._host.rules.run(absent_rules(self._names, "inet", "netdev"))

    async def wait_lost(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        self._host.close()
        self._addresses.close()
