"""What a home needs of its way out; and the way out of one made by root: a pair of links between home and host,
translated to the host's address. An ordinary user's is ``pasta_uplink``, that of a home in the host's own namespace
``host_uplink``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import IPv4Interface, IPv4Network
from typing import Protocol

from atelier.host.namespaces import entered, write_setting
from atelier.host.netlink import AddressWatch
from atelier.model.address_plan import AddressPlan
from atelier.network_holder.host_router import HostRouter
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.rules import absent_rules, host_rules
from atelier.network_holder.side import NetworkSide


class Watch(Protocol):
    """Becomes readable when something may have changed; ``drain`` tells whether it has."""

    def fileno(self) -> int: ...

    def drain(self) -> bool: ...


class Uplink(Protocol):
    @property
    def link(self) -> str | None:
        """Its end in the home; None: any link there but the bridge."""
        ...

    @property
    def watches(self) -> Sequence[Watch]:
        """What to look at for when a check is due."""
        ...

    def taken_networks(self) -> list[IPv4Network]:
        """What the host has addresses or routes for, the way out itself not counted."""
        ...

    def connected_networks(self) -> list[IPv4Network]:
        """The host's own networks, which guests reach only where their policies list them."""
        ...

    def own_networks(self) -> list[IPv4Network]:
        """What the host takes for itself: its addresses, which guests never reach."""
        ...

    def require_possible(self) -> None:
        """Raises HostError where the host lacks something, before anything is changed."""
        ...

    async def ensure(self, plan: AddressPlan, home: NetworkSide) -> None:
        """Idempotent."""
        ...

    async def check(self, plan: AddressPlan) -> bool:
        """Put back what somebody removed or changed; whether that was so."""
        ...

    def problems(self) -> list[str]:
        """What keeps guests from the internet and is not ours to mend."""
        ...

    async def remove(self) -> None:
        """Idempotent."""
        ...

    async def wait_lost(self) -> None:
        """Raises HostError when the home can be held no longer; never returns."""
        ...

    def close(self) -> None: ...


class VethUplink:
    """``host`` is the namespace in which the holder was started, ``addresses`` is opened there."""

    def __init__(self, names: NetworkNames, host: NetworkSide, addresses: AddressWatch) -> None:
        self._names = names
        self._host = host
        self._addresses = addresses
        self._router = HostRouter(names, host, names.uplink_host)
        self._listing: str | None = None

    @property
    def link(self) -> str:
        return self._names.uplink_home

    @property
    def watches(self) -> Sequence[Watch]:
        return [self._host.watch, self._addresses]

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
        """The rules stand before there is a link to pass them."""
        self._load(plan)
        if self._host.links.find_link(self._names.uplink_host) is None:
            self._host.links.create_veth(self._names.uplink_host, self._names.uplink_home, home.namespace)
        with entered(self._host.namespace):
            write_setting(f"ipv6/conf/{self._names.uplink_host}/disable_ipv6", "1", missing_ok=True)
        outside = self._host.links.get_link(self._names.uplink_host)
        inside = home.links.get_link(self._names.uplink_home)
        length = plan.uplink_subnet.prefixlen
        self._host.links.ensure_address(outside.index, IPv4Interface((plan.uplink_host, length)))
        home.links.ensure_address(inside.index, IPv4Interface((plan.uplink_home, length)))
        self._host.links.set_up(outside.index)
        home.links.set_up(inside.index)
        home.links.ensure_default_route(inside.index, plan.uplink_host)
        await self._router.ensure_accepted()

    async def check(self, plan: AddressPlan) -> bool:
        changed = self._host.rules.find(f"table inet {self._names.table}") != self._listing
        if changed:
            self._load(plan)
        return await self._router.ensure_accepted() or changed

    def problems(self) -> list[str]:
        return self._router.problems()

    async def remove(self) -> None:
        """The link goes first: no packet then needs the rules."""
        self._host.links.delete_link(self._names.uplink_host)
        await self._router.ensure_accepted_absent()
        self._host.rules.run(absent_rules(self._names, "inet"))
        self._listing = None

    async def wait_lost(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        self._host.close()
        self._addresses.close()

    def _load(self, plan: AddressPlan) -> None:
        self._host.rules.run(host_rules(self._names, plan))
        self._listing = self._host.rules.find(f"table inet {self._names.table}")
