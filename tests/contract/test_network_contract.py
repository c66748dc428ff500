"""What every network driver keeps to."""

from __future__ import annotations

import pytest

from atelier.drivers.network.fake import FakeNetwork
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.network.user import UserNetwork
from atelier.model.errors import HostError

SANDBOX, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


@pytest.fixture(params=[UserNetwork, FakeNetwork])
def network(request: pytest.FixtureRequest) -> NetworkDriver:
    return request.param()


async def test_a_slot_is_the_same_each_time(network: NetworkDriver) -> None:
    slot = await network.ensure_slot(SANDBOX, 0)
    assert await network.ensure_slot(SANDBOX, 0) == slot
    await network.ensure_slot_absent(SANDBOX)
    await network.ensure_slot_absent(SANDBOX)
    assert await network.ensure_slot(SANDBOX, 0) == slot


async def test_two_sandboxes_have_two_addresses(network: NetworkDriver) -> None:
    addresses = {(await network.ensure_slot(sandbox, 0)).mac_address for sandbox in (SANDBOX, OTHER)}
    assert len(addresses) == 2


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


async def test_the_fake_fails_as_told() -> None:
    network = FakeNetwork()
    network.faults.fail_next("ensure_slot")
    with pytest.raises(HostError):
        await network.ensure_slot(SANDBOX, 0)
    await network.ensure_slot(SANDBOX, 0)
    assert list(network.slots) == [SANDBOX]
