"""What every network driver keeps to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.network_lab import Home, network_lab, why_no_lab

from atelier.drivers.network.fake import FakeNetwork
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.network.succession import SucceededNetwork
from atelier.drivers.network.user import UserNetwork
from atelier.model.errors import HostError, NotFoundError
from atelier.model.network_policy import OPEN_POLICY, EgressMode, EgressPolicy, NetworkPolicy

NO_LAB = why_no_lab()
SANDBOX, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


@pytest.fixture(params=["closed", "fake", "succeeded", *Home])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NetworkDriver]:
    match request.param:
        case "closed":
            yield UserNetwork()
        case "fake":
            yield FakeNetwork()
        case "succeeded":
            yield SucceededNetwork(UserNetwork(), FakeNetwork())
        case home:
            if missing := why_no_lab(home):
                pytest.skip(missing)
            with network_lab(tmp_path, home) as lab:
                lab.start_holder()
                yield lab.driver()


async def test_a_slot_is_the_same_each_time(network: NetworkDriver) -> None:
    slot = await network.ensure_slot(SANDBOX, 0)
    assert await network.ensure_slot(SANDBOX, 0) == slot
    await network.ensure_slot_absent(SANDBOX)
    await network.ensure_slot_absent(SANDBOX)
    assert await network.ensure_slot(SANDBOX, 0) == slot


async def test_two_sandboxes_have_two_addresses(network: NetworkDriver) -> None:
    slots = [await network.ensure_slot(sandbox, lease) for lease, sandbox in enumerate((SANDBOX, OTHER))]
    assert len({slot.mac_address for slot in slots}) == 2
    addresses = [slot.guest.address for slot in slots if slot.guest is not None]
    assert len(set(addresses)) == len(addresses)


async def test_an_opened_slot_is_a_descriptor_where_the_machine_needs_one(network: NetworkDriver) -> None:
    slot = await network.ensure_slot(SANDBOX, 0)
    for _ in range(2):
        async with network.opened(SANDBOX) as descriptor:
            assert (descriptor is not None) == (slot.kind == "tap")
            if descriptor is not None:
                os.fstat(descriptor)
    if descriptor is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


async def test_a_slot_moves_to_another_lease(network: NetworkDriver) -> None:
    first = await network.ensure_slot(SANDBOX, 0)
    second = await network.ensure_slot(SANDBOX, 3)
    assert second.mac_address == first.mac_address
    await network.ensure_slot(OTHER, 0)


async def test_addresses_are_local_unicast(network: NetworkDriver) -> None:
    first_octet = int((await network.ensure_slot(SANDBOX, 0)).mac_address.split(":")[0], 16)
    assert first_octet & 0b11 == 0b10


async def test_the_absent_slot_of_an_unknown_sandbox(network: NetworkDriver) -> None:
    await network.ensure_slot_absent(OTHER)


async def test_no_slot_is_held_after_it_was_given_back(network: NetworkDriver) -> None:
    await network.ensure_slot(SANDBOX, 0)
    await network.ensure_slot(OTHER, 1)
    assert await network.list_slots() in ([], [SANDBOX, OTHER]), "a driver may hold nothing at all for a slot"
    await network.ensure_slot_absent(OTHER)
    assert OTHER not in await network.list_slots()
    await network.ensure_slot_absent(SANDBOX)
    assert await network.list_slots() == []


async def test_a_policy_wants_a_slot_where_it_means_something(network: NetworkDriver) -> None:
    policy = NetworkPolicy(EgressPolicy.make(EgressMode.LIST, ["203.0.113.0/24"], ["*.example.com"]), 1000, 1000)
    await network.ensure_slot(SANDBOX, 0, policy)
    await network.ensure_slot(SANDBOX, 0, OPEN_POLICY)
    for _ in range(2):
        await network.set_policy(SANDBOX, policy)
    await network.ensure_slot_absent(SANDBOX)
    if network.enforces_policies:
        with pytest.raises(NotFoundError) as absent:
            await network.set_policy(SANDBOX, policy)
        assert absent.value.code == "no_network_slot"
    else:
        await network.set_policy(SANDBOX, policy)


async def test_usage_is_told_of_slots(network: NetworkDriver) -> None:
    assert await network.read_usage() == {}
    await network.ensure_slot(SANDBOX, 0)
    usage = await network.read_usage()
    assert set(usage) == ({SANDBOX} if network.enforces_policies else set())
    assert all(each.refused_packets == 0 for each in usage.values())
    await network.ensure_slot_absent(SANDBOX)
    assert await network.read_usage() == {}


async def test_the_fake_fails_as_told() -> None:
    network = FakeNetwork()
    network.faults.fail_next("ensure_slot")
    with pytest.raises(HostError):
        await network.ensure_slot(SANDBOX, 0)
    await network.ensure_slot(SANDBOX, 0)
    assert list(network.slots) == [SANDBOX]
