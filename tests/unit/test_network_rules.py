"""The text of a home's rules: what its sets of addresses name."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise

import pytest

from atelier.model.address_plan import AddressPlan
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.rules import Carried, Surroundings, home_rules

OWN = ("198.51.100.1/32", "198.51.100.3/32", "203.0.113.64/26", "203.0.113.77/32", "255.255.255.255/32")
CONNECTED = ("198.51.100.0/24", "10.9.0.0/16", "0.0.0.0/8")
AROUND = Surroundings(
    AddressPlan(IPv4Network("10.76.0.0/16")),
    "way-out",
    frozenset(map(IPv4Network, OWN)),
    frozenset(map(IPv4Network, CONNECTED)),
)


def ranges(name: str) -> list[tuple[IPv4Address, IPv4Address]]:
    text = home_rules(NetworkNames("test", "br0"), AROUND, (), Carried({}, {}))
    (elements,) = re.findall(rf"set {name} \{{[^}}]*elements = \{{ ([^}}]*) \}}", text)
    pairs = [each.partition("-") for each in elements.split(", ")]
    assert all(first != last for first, _, last in pairs), "nft refuses a range of one"
    return [(IPv4Address(first), IPv4Address(last or first)) for first, _, last in pairs]


@pytest.mark.parametrize(("name", "left_out"), [("reachable", AROUND.never), ("public_addresses", AROUND.private)])
def test_a_set_names_all_that_is_not_left_out(name: str, left_out: set[IPv4Network]) -> None:
    found = ranges(name)
    borders = {end for pair in found for end in pair}
    borders |= {end for network in left_out for end in (network.network_address, network.broadcast_address)}
    tried = {IPv4Address(min(max(int(border) + step, 0), (1 << 32) - 1)) for border in borders for step in (-1, 0, 1)}
    for address in tried:
        named = any(first <= address <= last for first, last in found)
        assert named is not any(address in network for network in left_out), address
    assert all(before < after for (_, before), (after, _) in pairwise(found)), "none overlap"
