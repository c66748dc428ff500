"""The kinds of home there are, each with its place and its way out. Called by the holder's program, before any loop
runs: an ordinary user's holder has to leave the host's namespaces while it has one thread.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from atelier.host.namespaces import entered, may_change_network, open_current
from atelier.host.netlink import AddressWatch, RouteSocket
from atelier.model.errors import HostError
from atelier.model.layout import RunLayout
from atelier.network_holder.dns_upstream import SocketMaker
from atelier.network_holder.host_uplink import HostUplink
from atelier.network_holder.keeper_client import NetworkKeeper
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.pasta_uplink import PastaUplink
from atelier.network_holder.places import HostPlace, KeptPlace, NamedPlace, Place
from atelier.network_holder.side import NetworkSide
from atelier.network_holder.uplink import Uplink, VethUplink


@dataclass(frozen=True, slots=True)
class Ground:
    """``uplink`` is the caller's to close. ``make_socket``'s are of the host's namespace."""

    place: Place
    uplink: Uplink
    make_socket: SocketMaker


def open_ground(layout: RunLayout, names: NetworkNames, keeper_log: Path, *, in_host: bool) -> Ground:
    """``in_host``: in the host's own namespace. Raises HostError, MissingProgramError."""
    if in_host:
        if not may_change_network():
            raise HostError(
                "only root, or who has the capability NET_ADMIN, can have the sandboxes' bridge in the host's own namespace",
                code="network_not_possible",
                hint="run the manager as root, let the host's service atelier-network hold it (atelier host init), "
                "or set ATELIER_NETWORK_HOME=private",
            )
        host = NetworkSide.open(open_current())
        return Ground(HostPlace(), HostUplink(names, host, AddressWatch()), _made_in(host.namespace))
    if os.geteuid() == 0:
        host = NetworkSide.open(open_current())
        return Ground(NamedPlace(names.namespace), VethUplink(names, host, AddressWatch()), _made_in(host.namespace))
    keeper = NetworkKeeper.ensure(layout, names.installation_id, keeper_log)
    uplink = PastaUplink(names, keeper, RouteSocket(), AddressWatch())
    keeper.enter()
    return Ground(KeptPlace(keeper), uplink, keeper.make_socket)


def _made_in(namespace: int) -> SocketMaker:
    def make(family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        with entered(namespace):
            return socket.socket(family, kind | socket.SOCK_NONBLOCK)

    return make
