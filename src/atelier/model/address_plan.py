"""Which addresses the sandboxes of an installation have: everything follows from one IPv4 network.

The network's driver tells the lifecycle how many slots there are; the network holder sets addresses up. Pure arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from atelier.model.errors import HostError
from atelier.model.machine import GuestAddress

PREFIX_LENGTH = 16
SLOT_COUNT = 1023
"""A Linux bridge has that many ports. Source: net/bridge/br_private.h, BR_MAX_PORTS. The addresses would go further."""

LINK_NAME_MAX_LENGTH = 15
"""IFNAMSIZ holds 16 bytes with its final NUL."""

_LINK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NO_LINK_NAMES = ("lo", "all", "default")
"""Loopback, and what the settings of all links are called."""
_FIRST_LEASE = 2
_TEN = IPv4Network("10.0.0.0/8")
_CARRIER_GRADE = IPv4Network("100.64.0.0/10")


@dataclass(frozen=True, slots=True)
class AddressPlan:
    """``subnet`` is the guests'. Its last four addresses are the way out's: they lie behind all leases."""

    subnet: IPv4Network

    @property
    def gateway(self) -> IPv4Address:
        return self.subnet[1]

    @property
    def uplink_host(self) -> IPv4Address:
        """Of the way out's end on the host."""
        return self.subnet[-3]

    @property
    def uplink_home(self) -> IPv4Address:
        """Of its end in the network's home: all that guests send comes from here."""
        return self.subnet[-2]

    @property
    def uplink_subnet(self) -> IPv4Network:
        return IPv4Network((self.uplink_host, 30), strict=False)

    def address_of(self, lease: int) -> IPv4Address:
        if not 0 <= lease < SLOT_COUNT:
            raise HostError(
                f"there is no network slot {lease}: a bridge has {SLOT_COUNT} ports",
                code="no_network_slot",
                hint="destroy sandboxes that are no longer needed",
            )
        return self.subnet[_FIRST_LEASE + lease]

    def guest_address(self, lease: int) -> GuestAddress:
        return GuestAddress(str(self.address_of(lease)), self.subnet.prefixlen, str(self.gateway), str(self.gateway))


def is_link_name(name: str) -> bool:
    """Whether a bridge may be called so."""
    fits = len(name) <= LINK_NAME_MAX_LENGTH and _LINK_NAME.fullmatch(name) is not None
    return fits and name not in _NO_LINK_NAMES


def is_plan_subnet(subnet: IPv4Network) -> bool:
    """Whether a plan may stand on this network: one of those that ``choose_plan`` knows."""
    return subnet.prefixlen == PREFIX_LENGTH and (subnet.subnet_of(_TEN) or subnet.subnet_of(_CARRIER_GRADE))


def choose_plan(taken: Iterable[IPv4Network], seed: int) -> AddressPlan:
    """A plan that overlaps none of ``taken``; ``seed`` spreads installations over what is free. Raises HostError
    (``network_overlap``) when everything is taken."""
    used = [network for network in taken if network.prefixlen > 0]
    for subnet in _candidates(seed):
        if not any(subnet.overlaps(network) for network in used):
            return AddressPlan(subnet)
    raise HostError(
        "no range of addresses is free for sandboxes: this machine has routes over all of 10.0.0.0/8 and 100.64.0.0/10",
        code="network_overlap",
        hint="ip route shows them; narrow one, or keep the network closed (ATELIER_NETWORK=closed)",
    )


def overlapping(plan: AddressPlan, taken: Iterable[IPv4Network]) -> list[IPv4Network]:
    return [network for network in taken if network.prefixlen > 0 and plan.subnet.overlaps(network)]


def _candidates(seed: int) -> Iterator[IPv4Network]:
    # 10.0, 10.1 and 10.2xx are what people choose for their own networks: last.
    for block, first, count in ((_TEN, 64, 128), (_CARRIER_GRADE, 0, 64), (_TEN, 2, 62), (_TEN, 192, 64), (_TEN, 0, 2)):
        for step in range(count):
            number = first + (seed + step) % count
            yield IPv4Network((int(block.network_address) + (number << 16), PREFIX_LENGTH))
