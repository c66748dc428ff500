"""What a home needs of its way out; and the way out of one made by root: a pair of links between home and host,
translated to the host's address. An ordinary user's is ``pasta_uplink``.

What the host needs for it and has not got is told in words, never changed: ``ip_forward`` would make the host a router
between all its networks, and another program's chain that drops what is forwarded is that program's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from ipaddress import IPv4Interface, IPv4Network
from typing import Protocol

from atelier.host.namespaces import entered, prefix_for, write_setting
from atelier.host.netlink import AddressWatch
from atelier.model.address_plan import AddressPlan
from atelier.model.errors import HostError
from atelier.network_holder import docker
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.rules import absent_rules, host_rules
from atelier.network_holder.side import NetworkSide

_CHAIN = re.compile(r"^table (\w+) (\S+) \{|^\tchain (\S+) \{|hook (forward) .*policy drop", re.MULTILINE)


class Watch(Protocol):
    """Becomes readable when something may have changed; ``drain`` tells whether it has."""

    def fileno(self) -> int: ...

    def drain(self) -> bool: ...


class Uplink(Protocol):
    @property
    def link(self) -> str:
        """Its end in the home."""
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
        self._listing: str | None = None

    @property
    def link(self) -> str:
        return self._names.uplink_home

    @property
    def watches(self) -> Sequence[Watch]:
        return [self._host.watch, self._addresses]

    def taken_networks(self) -> list[IPv4Network]:
        own = self._host.links.find_link(self._names.uplink_host)
        index = own.index if own else 0
        addresses = [address.network for number, address in self._host.links.addresses() if number != index]
        return addresses + [route.network for route in self._host.links.routes() if route.interface != index]

    def connected_networks(self) -> list[IPv4Network]:
        return sorted(
            {route.network for route in self._host.links.routes() if route.connected and route.network.prefixlen}
        )

    def own_networks(self) -> list[IPv4Network]:
        return self._host.links.local_networks()

    def require_possible(self) -> None:
        """Raises HostError (``forwarding_off``)."""
        if not self._host.links.is_forwarding():
            raise HostError(
                "this machine forwards no packets (net.ipv4.ip_forward is 0), so sandboxes would have no way out",
                code="forwarding_off",
                hint="as root: sysctl -w net.ipv4.ip_forward=1 (and in /etc/sysctl.d to keep it); or ATELIER_NETWORK=closed",
            )

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
        await docker.ensure_accepted(self._names, prefix_for(self._host.namespace))

    async def check(self, plan: AddressPlan) -> bool:
        changed = self._host.rules.find(f"table inet {self._names.table}") != self._listing
        if changed:
            self._load(plan)
        return await docker.ensure_accepted(self._names, prefix_for(self._host.namespace)) or changed

    def problems(self) -> list[str]:
        found: list[str] = []
        if not self._host.links.is_forwarding():
            found.append(
                "net.ipv4.ip_forward is 0: sandboxes have no way out; as root: sysctl -w net.ipv4.ip_forward=1"
            )
        dropping = self._dropping_chains()
        if dropping and not docker.is_present(dropping):
            names = ", ".join(" ".join(chain) for chain in dropping)
            found.append(
                f"{names} drops what is forwarded: let pass what comes from and goes to {self._names.uplink_host} there"
            )
        return found

    async def remove(self) -> None:
        """The link goes first: no packet then needs the rules."""
        self._host.links.delete_link(self._names.uplink_host)
        await docker.ensure_accepted_absent(self._names, prefix_for(self._host.namespace))
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

    def _dropping_chains(self) -> list[tuple[str, str, str]]:
        """(family, table, chain) of the host's that drop what is forwarded unless a rule of theirs lets it pass."""
        found: list[tuple[str, str, str]] = []
        family = table = chain = ""
        for match in _CHAIN.finditer(self._host.rules.run("list chains")):
            if match[1]:
                family, table = match[1], match[2]
            elif match[3]:
                chain = match[3]
            elif family in ("ip", "inet"):
                found.append((family, table, chain))
        return found
