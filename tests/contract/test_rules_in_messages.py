"""A slot's rules, said in the kernel's messages and said in nft's words, are the same rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
from tests.network_lab import BRIDGE, INSTALLATION, network_lab, why_no_lab

from atelier.host import tap
from atelier.host.netlink import RouteSocket
from atelier.host.nftables import Nftables
from atelier.host.nftables_messages import address_key, element_added, element_removed
from atelier.model.address_plan import AddressPlan
from atelier.model.errors import CommandError
from atelier.model.network_policy import OPEN_POLICY, EgressMode, EgressPolicy, NetworkPolicy
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.rules import (
    Carried,
    Slot,
    Surroundings,
    home_rules,
    names_opened,
    slot_added,
    slot_chain,
    slot_changed,
    slot_removed,
)

NO_LAB = why_no_lab()
pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

NAMES = NetworkNames(INSTALLATION, BRIDGE)
TAP = f"at{INSTALLATION}aaaaaaaa"
AROUND = Surroundings(AddressPlan(IPv4Network("10.76.0.0/16")), NAMES.uplink_home, frozenset(), frozenset())
ADDRESS = IPv4Address("10.76.0.2")
OPENED = IPv4Address("203.0.113.9")
EVERYWHERE = [
    OPEN_POLICY,
    NetworkPolicy(EgressPolicy(EgressMode.NONE)),
    NetworkPolicy(EgressPolicy.make(EgressMode.ALL, ["10.1.0.0/16"]), upload_kbit_per_second=10_000),
    NetworkPolicy(EgressPolicy.make(EgressMode.LIST, ["1.1.1.1"], ["example.com"]), upload_kbit_per_second=64),
]


def slot(policy: NetworkPolicy, generation: int) -> Slot:
    return Slot(TAP, "02:00:00:12:34:56", ADDRESS, policy, generation)


@pytest.fixture
def rules(tmp_path: Path) -> Iterator[Nftables]:
    with network_lab(tmp_path) as lab, lab.inside("internet"), opened() as rules:
        tap.create_persistent(TAP)
        rules.run(home_rules(NAMES, AROUND, [], Carried({}, {})))
        yield rules


@contextmanager
def opened() -> Iterator[Nftables]:
    links, rules = RouteSocket(), Nftables()
    try:
        yield rules
    finally:
        rules.close()
        links.close()


def listing(rules: Nftables) -> tuple[str | None, ...]:
    return tuple(rules.find(f"table {family} {NAMES.table}") for family in ("inet", "netdev"))


def in_words(
    rules: Nftables, *slots: Slot, names: dict[tuple[IPv4Address, IPv4Address], int]
) -> tuple[str | None, ...]:
    rules.run(home_rules(NAMES, AROUND, slots, Carried(names, {})))
    return listing(rules)


@pytest.mark.parametrize("policy", EVERYWHERE)
def test_a_slot_that_is_added_and_removed(rules: Nftables, policy: NetworkPolicy) -> None:
    empty = listing(rules)
    one = slot(policy, 0x12345678)
    if chain := slot_chain(NAMES, one):
        rules.run(chain)
    rules.apply(slot_added(NAMES, one))
    rules.apply(names_opened(NAMES, ADDRESS, {OPENED: 600}))
    said = listing(rules)
    assert said != empty
    assert said == in_words(rules, one, names={(ADDRESS, OPENED): 600})
    rules.apply(slot_removed(NAMES, one, [OPENED, IPv4Address("203.0.113.10")]))
    assert listing(rules) == empty


@pytest.mark.parametrize("before", EVERYWHERE)
@pytest.mark.parametrize("after", EVERYWHERE)
def test_a_policy_that_is_changed(rules: Nftables, before: NetworkPolicy, after: NetworkPolicy) -> None:
    in_words(rules, slot(before, 7), names={(ADDRESS, OPENED): 600})
    if chain := slot_chain(NAMES, slot(after, 0xFFFFFFFF)):
        rules.run(chain)
    rules.apply(slot_changed(NAMES, slot(before, 7), slot(after, 0xFFFFFFFF), [OPENED]))
    said = listing(rules)
    assert said == in_words(rules, slot(after, 0xFFFFFFFF), names={})


def test_a_transaction_that_is_refused_changes_nothing(rules: Nftables) -> None:
    before, generation = listing(rules), rules.generation()
    there = element_added(NAMES.table, "refused", address_key(ADDRESS))
    for wrong in (
        element_removed(NAMES.table, "refused", address_key(IPv4Address("10.76.0.9"))),
        element_added("no_such_table", "refused", address_key(ADDRESS)),
        element_added(NAMES.table, "egress", address_key(ADDRESS), jump_to="no_such_chain"),
    ):
        for messages in ([there, wrong], [wrong, there], [wrong]):
            with pytest.raises(CommandError, match="No such file or directory"):
                rules.apply(messages)
    assert (listing(rules), rules.generation()) == (before, generation)
    rules.apply([there])
    assert rules.generation() == generation + 1
