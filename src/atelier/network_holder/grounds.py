"""The kinds of home there are, each with its place and its way out. Called by the holder's program, before any loop
runs: an ordinary user's holder has to leave the host's namespaces while it has one thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from atelier.host.namespaces import open_current
from atelier.host.netlink import AddressWatch, RouteSocket
from atelier.model.layout import RunLayout
from atelier.network_holder.keeper_client import NetworkKeeper
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.pasta_uplink import PastaUplink
from atelier.network_holder.places import KeptPlace, NamedPlace, Place
from atelier.network_holder.side import NetworkSide
from atelier.network_holder.uplink import Uplink, VethUplink


@dataclass(frozen=True, slots=True)
class Ground:
    """``uplink`` is the caller's to close."""

    place: Place
    uplink: Uplink


def open_ground(layout: RunLayout, names: NetworkNames, keeper_log: Path) -> Ground:
    """Raises HostError, MissingProgramError."""
    if os.geteuid() == 0:
        return Ground(NamedPlace(names.namespace), VethUplink(names, NetworkSide.open(open_current())))
    keeper = NetworkKeeper.ensure(layout, names.installation_id, keeper_log)
    uplink = PastaUplink(names, keeper, RouteSocket(), AddressWatch())
    keeper.enter()
    return Ground(KeptPlace(keeper), uplink)
