"""A network holder that ends anywhere while it takes or frees a slot: the next one makes it whole, and the packets of a
guest that is there then go where they may and nowhere else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
from tests.contract.packet_stage import Guest, Stage
from tests.contract.packet_table import try_table
from tests.contract.test_network_packets import NEIGHBOUR, NO_LAB
from tests.network_lab import NetworkLab, network_lab

from atelier.model.errors import TransientError
from atelier.model.network_policy import EgressMode, EgressPolicy, NetworkPolicy

pytestmark = pytest.mark.skipif(bool(NO_LAB), reason=NO_LAB)

SANDBOX, LEASE = "cccccccccccc", 2
# With a chain of its own and a rate, so that there is most to do; what the table expects is allowed all the same.
POLICY = NetworkPolicy(EgressPolicy.make(EgressMode.LIST, ["203.0.113.0/24"]), upload_kbit_per_second=1_000_000)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[NetworkLab]:
    with network_lab(tmp_path) as made:
        yield made


async def crashes(lab: NetworkLab, number: int, work: Callable[[], Awaitable[object]]) -> bool:
    """Whether the holder ended before its Nth change; another one stands in its place afterwards."""
    lab.stop_holder()
    program = ("tests.contract.crashing_holder", str(number))
    lab.start_holder(program=program)
    try:
        await work()
    except TransientError:
        assert lab.holder is not None
        assert lab.holder.wait(60) == 9
        lab.start_holder()
        return True
    lab.stop_holder()
    lab.start_holder()
    return False


async def test_while_a_slot_is_taken(lab: NetworkLab) -> None:
    lab.start_holder()
    async with AsyncExitStack() as stack:
        neighbour = await open_guest(lab, stack, NEIGHBOUR, 1)
        before = lab.state()
        number = 1
        while await crashes(lab, number, lambda: lab.driver().ensure_slot(SANDBOX, LEASE, POLICY)):
            async with AsyncExitStack() as own:
                guest = await open_guest(lab, own, SANDBOX, LEASE)
                stage = Stage(lab, guest, neighbour)
                ears = own.enter_context(ExitStack())
                stage.open(ears)
                assert try_table(stage) == [], f"after a crash before change {number}"
            await lab.driver().ensure_slot_absent(SANDBOX)
            assert lab.state() == before, f"after a crash before change {number}"
            number += 1
    assert number > 10, "a link, its place on the bridge, rules, a file"


async def test_while_a_slot_is_freed(lab: NetworkLab) -> None:
    lab.start_holder()
    await lab.driver().ensure_slot(NEIGHBOUR, 1)
    before = lab.state()
    number = 1
    while True:
        await lab.driver().ensure_slot(SANDBOX, LEASE, POLICY)
        crashed = await crashes(lab, number, lambda: lab.driver().ensure_slot_absent(SANDBOX))
        await lab.driver().ensure_slot_absent(SANDBOX)
        lab.ask("check")
        assert lab.state() == before, f"after a crash before change {number}"
        if not crashed:
            break
        number += 1
    assert number > 3, "a link, rules, a file"


async def open_guest(lab: NetworkLab, stack: AsyncExitStack, sandbox: str, lease: int) -> Guest:
    driver = lab.driver()
    attachment = await driver.ensure_slot(sandbox, lease)
    descriptor = await stack.enter_async_context(driver.opened(sandbox))
    assert descriptor is not None
    return Guest(descriptor, attachment)
