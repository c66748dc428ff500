"""The way out for a home made by root: a pair of links between home and host, translated to the host's address.

An ordinary user's way out is another class of the same shape (``pasta`` in place of the pair); the home is the same.
What the host needs for it and has not got is told in words, never changed: ``ip_forward`` would make the host a router
between all its networks, and another program's chain that drops what is forwarded is that program's.
"""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from atelier.host.namespaces import entered, prefix_for, write_setting
from atelier.model.address_plan import AddressPlan
from atelier.model.errors import HostError
from atelier.network_holder import docker
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.rules import absent_rules, host_rules
from atelier.network_holder.side import NetworkSide

_CHAIN = re.compile(r"^table (\w+) (\S+) \{|^\tchain (\S+) \{|hook (forward) .*policy drop", re.MULTILINE)


class VethUplink:
    """``host`` is the namespace in which the holder was started."""

    def __init__(self, names: NetworkNames, host: NetworkSide) -> None:
        self._names = names
        self._host = host
        self._listing: str | None = None

    @property
    def link(self) -> str:
        """Its end in the home."""
        return self._names.uplink_home

    def taken_networks(self) -> list[IPv4Network]:
        """What the host has addresses or routes for, the way out itself not counted."""
        own = self._host.links.find_link(self._names.uplink_host)
        index = own.index if own else 0
        addresses = [address.network for number, address in self._host.links.addresses() if number != index]
        return addresses + [route.network for route in self._host.links.routes() if route.interface != index]

    def own_addresses(self) -> list[IPv4Address]:
        """The host's, loopback's among them."""
        return [address.ip for _, address in self._host.links.addresses()]

    def connected_networks(self) -> list[IPv4Network]:
        """The host's own networks, which guests reach only where their policies list them."""
        return sorted(
            {route.network for route in self._host.links.routes() if route.connected and route.network.prefixlen}
        )

    def make_socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """From which the host's nameservers are reached, those on its loopback too. Raises OSError."""
        with entered(self._host.namespace):
            return socket.socket(family, kind | socket.SOCK_NONBLOCK)

    def require_forwarding(self) -> None:
        """Raises HostError (``forwarding_off``)."""
        if not self._host.links.is_forwarding():
            raise HostError(
                "this machine forwards no packets (net.ipv4.ip_forward is 0), so sandboxes would have no way out",
                code="forwarding_off",
                hint="as root: sysctl -w net.ipv4.ip_forward=1 (and in /etc/sysctl.d to keep it); or ATELIER_NETWORK=closed",
            )

    async def ensure(self, plan: AddressPlan, home: NetworkSide) -> None:
        """Idempotent. The rules stand before there is a link to pass them."""
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
        """Put the host's rules back where somebody removed or changed them; whether that was so."""
        changed = self._host.rules.find(f"table inet {self._names.table}") != self._listing
        if changed:
            self._load(plan)
        return await docker.ensure_accepted(self._names, prefix_for(self._host.namespace)) or changed

    def problems(self) -> list[str]:
        """What keeps guests from the internet and is not ours to mend."""
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
        """Idempotent. The link goes first: no packet then needs the rules."""
        self._host.links.delete_link(self._names.uplink_host)
        await docker.ensure_accepted_absent(self._names, prefix_for(self._host.namespace))
        self._host.rules.run(absent_rules(self._names, "inet"))
        self._listing = None

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
