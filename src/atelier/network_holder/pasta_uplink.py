"""The way out for an ordinary user's home: ``pasta``, which makes of what comes out of the home connections of a program
of the user's.

To the host these are the user's own, so nothing there can tell them from any other: that guests reach none of the
host's addresses is seen to in the home, whose rules have all of them, renewed when the kernel tells of a change.
pasta itself is kept running by the keeper, outside. Source: pasta(1).
"""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Interface, IPv4Network

from atelier.host.netlink import AddressWatch, RouteSocket
from atelier.model.address_plan import AddressPlan
from atelier.network_holder.keeper_client import NetworkKeeper
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.side import NetworkSide

_UP_SECONDS = 5.0


class PastaUplink:
    """``links`` and ``watch`` are of the host's namespace, opened before this process left it."""

    def __init__(self, names: NetworkNames, keeper: NetworkKeeper, links: RouteSocket, watch: AddressWatch) -> None:
        self._names = names
        self._keeper = keeper
        self._links = links
        self._watch = watch
        self._home: NetworkSide | None = None
        self._interfaces: set[int] = set()
        self._removed = False

    @property
    def link(self) -> str:
        return self._names.uplink_home

    @property
    def watches(self) -> list[AddressWatch]:
        return [self._watch]

    def taken_networks(self) -> list[IPv4Network]:
        addresses = [address.network for _, address in self._links.addresses()]
        return addresses + [route.network for route in self._links.routes()]

    def connected_networks(self) -> list[IPv4Network]:
        return self._links.connected_networks()

    def own_networks(self) -> list[IPv4Network]:
        return self._links.local_networks()

    def require_possible(self) -> None:
        """Whatever could be missing shows when the keeper starts."""

    async def ensure(self, plan: AddressPlan, home: NetworkSide) -> None:
        """Waits until it is there, for a while: a machine that is not connected to anything has it later."""
        self._home = home
        self._interfaces = self._outward()
        address = _address(plan)
        if self._keeper.uplink_address() != str(address):
            self._start(plan)
        for _ in range(int(_UP_SECONDS / 0.02)):
            if address in [each for _, each in home.links.addresses()]:
                return
            await asyncio.sleep(0.02)

    async def check(self, plan: AddressPlan) -> bool:
        """pasta keeps to the link that led out of this machine when it started: where that is another by now, it is
        started anew."""
        if self._outward() not in (self._interfaces, set()):
            self._start(plan)
        return False

    def problems(self) -> list[str]:
        if self._home is None or self._home.links.find_link(self.link) is not None:
            return []
        reason = self._keeper.uplink_problem() or "it has not started yet"
        return [f"sandboxes have no way out, pasta does not run: {reason}"]

    async def remove(self) -> None:
        self._removed = True
        self._keeper.remove_uplink()

    async def wait_lost(self) -> None:
        """When the keeper has ended without having been told to."""
        loop = asyncio.get_running_loop()
        lost = asyncio.Event()
        loop.add_reader(self._keeper.fileno(), lost.set)
        try:
            await lost.wait()
        finally:
            loop.remove_reader(self._keeper.fileno())
        if self._removed:
            await asyncio.Event().wait()
        self._keeper.uplink_problem()

    def close(self) -> None:
        self._links.close()
        self._watch.close()
        self._keeper.close()

    def _start(self, plan: AddressPlan) -> None:
        self._interfaces = self._outward()
        self._keeper.set_uplink(_address(plan), plan.uplink_host)

    def _outward(self) -> set[int]:
        """Links with a default route."""
        return {route.interface for route in self._links.routes() if route.network.prefixlen == 0}


def _address(plan: AddressPlan) -> IPv4Interface:
    return IPv4Interface((plan.uplink_home, plan.uplink_subnet.prefixlen))
