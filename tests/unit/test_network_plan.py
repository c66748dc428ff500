"""Addresses, names and settings of the bridge network: what follows from what, without a kernel."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from atelier.config.settings import NetworkChoice, load_settings
from atelier.model.address_plan import LINK_NAME_MAX_LENGTH, SLOT_COUNT, AddressPlan, choose_plan
from atelier.model.errors import HostError, InvalidRequestError
from atelier.network_holder.names import NetworkNames
from atelier.network_holder.plans import settle_plan

PLAN = AddressPlan(IPv4Network("10.77.0.0/16"))
NAMES = NetworkNames("k3fa", "br0")


def test_addresses_follow_from_the_lease() -> None:
    guest = PLAN.guest_address(0)
    assert (guest.address, guest.prefix_length, guest.gateway) == ("10.77.0.2", 16, "10.77.0.1")
    addresses = {PLAN.address_of(lease) for lease in range(SLOT_COUNT)}
    assert len(addresses) == SLOT_COUNT
    assert not addresses & {PLAN.gateway, PLAN.uplink_home, PLAN.uplink_host}
    assert not any(address in PLAN.uplink_subnet for address in addresses)
    assert {PLAN.uplink_home, PLAN.uplink_host} <= set(PLAN.uplink_subnet.hosts())


@pytest.mark.parametrize("lease", [-1, SLOT_COUNT])
def test_there_are_as_many_slots_as_a_bridge_has_ports(lease: int) -> None:
    with pytest.raises(HostError) as refused:
        PLAN.address_of(lease)
    assert refused.value.code == "no_network_slot"


def test_a_plan_avoids_what_is_taken() -> None:
    taken = [
        IPv4Network("0.0.0.0/0"),
        IPv4Network("10.0.0.0/9"),
        IPv4Network("10.128.0.0/10"),
        IPv4Network("10.200.1.0/24"),
    ]
    for seed in range(300):
        subnet = choose_plan(taken, seed).subnet
        assert not any(subnet.overlaps(network) for network in taken[1:])
    assert len({choose_plan([], seed) for seed in range(100)}) == 100, "installations are spread"


def test_where_everything_is_taken_it_is_said() -> None:
    with pytest.raises(HostError, match=r"ip route") as refused:
        choose_plan([IPv4Network("10.0.0.0/8"), IPv4Network("100.64.0.0/10")], 5)
    assert refused.value.code == "network_overlap"


def test_a_plan_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "network.json"
    first = settle_plan(file, "k3fa", [], None)
    assert settle_plan(file, "other", [], None) == first, "the file decides"
    assert settle_plan(file, "k3fa", [first.subnet], first.subnet) == first, "what is in use stands"
    assert settle_plan(file, "k3fa", [first.subnet], None) != first


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"subnet": 5}', '{"subnet": "192.168.0.0/16"}', '{"subnet": "10.1.1.0/24"}']
)
def test_a_plan_that_cannot_be_read_is_chosen_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "network.json"
    file.write_text(content)
    plan = settle_plan(file, "k3fa", [], None)
    assert json.loads(file.read_text()) == {"subnet": str(plan.subnet)}


def test_names_fit_and_are_told_apart() -> None:
    tap = NAMES.tap("abcdefgh2345")
    assert tap == "atk3faabcdefgh"
    for name in (tap, NAMES.uplink_home, NAMES.uplink_host):
        assert len(name) <= LINK_NAME_MAX_LENGTH
    assert NAMES.is_tap(tap)
    assert not any(NAMES.is_tap(name) for name in (NAMES.uplink_home, NAMES.uplink_host, "br0", "eth0"))


@pytest.mark.parametrize("bridge", ["", "lo", "all", "x" * 16, "br 0", 'br0"', "-x", "atk3fa1", "br/0", "brücke"])
def test_what_cannot_be_a_bridges_name(bridge: str) -> None:
    with pytest.raises(InvalidRequestError):
        NetworkNames("k3fa", bridge)


@pytest.mark.parametrize("installation", ["", "k3f", "K3FA", "k3f1", "k3fa "])
def test_what_cannot_be_an_installation(installation: str) -> None:
    with pytest.raises(InvalidRequestError):
        NetworkNames(installation, "br0")


def test_the_network_is_what_the_machine_can_have_unless_asked_for() -> None:
    assert load_settings(environment={"HOME": "/x"}).network is NetworkChoice.AUTO
    assert load_settings(environment={"HOME": "/x", "ATELIER_NETWORK": "bridge"}).network is NetworkChoice.BRIDGE
    with pytest.raises(InvalidRequestError, match="ATELIER_NETWORK") as refused:
        load_settings(environment={"HOME": "/x", "ATELIER_NETWORK": "open"})
    assert "auto, bridge, closed" in refused.value.hint
