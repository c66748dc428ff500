"""Network policies on fakes: taken with the slot, changed live, stored and tried again when the network fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.lifecycle.conftest import Host

from atelier.db.sandbox_networks import SandboxNetwork, SandboxNetworkRepository
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import (
    AtelierError,
    ConflictError,
    HostError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    TransientError,
)
from atelier.model.machine import GuestAddress, NetworkAttachment
from atelier.model.network_policy import CLOSED_POLICY, OPEN_POLICY, EgressMode, EgressPolicy, NetworkPolicy
from atelier.model.network_policy_edit import edit_egress
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState

LISTED = NetworkPolicy(EgressPolicy.make(EgressMode.LIST, ["203.0.113.0/24"], ["example.com"]), 10_000, None)
UNREACHABLE = TransientError("the network holder is gone", code="network_holder_unreachable")


def to(policy: NetworkPolicy) -> Callable[[NetworkPolicy], NetworkPolicy]:
    return lambda _: policy


def allowing(entry: str) -> Callable[[NetworkPolicy], NetworkPolicy]:
    return lambda present: NetworkPolicy(edit_egress(present.egress, allow=[entry]))


def stored(host: Host, sandbox_id: str) -> SandboxNetwork:
    with host.database.read() as connection:
        return SandboxNetworkRepository().get(connection, sandbox_id)


def in_force(host: Host, lifecycle: SandboxLifecycle, sandbox_id: str) -> bool:
    is_pending = stored(host, sandbox_id).is_pending
    return lifecycle.network_policies.is_in_force(sandbox_id, is_pending=is_pending)


def changes(host: Host) -> list[dict[str, Any]]:
    return [event.payload for event in host.events() if event.kind == "sandbox.network_changed"]


async def created(host: Host, lifecycle: SandboxLifecycle, policy: NetworkPolicy = OPEN_POLICY) -> Sandbox:
    sandbox = await lifecycle.start_create("one", SandboxSpec(), policy)
    settled = await lifecycle.wait_settled(sandbox.id, 20)
    assert settled is not None
    assert settled.state is SandboxState.RUNNING, settled.failure_message
    return settled


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


async def settle(lifecycle: SandboxLifecycle, sandbox_id: str) -> SandboxState:
    settled = await lifecycle.wait_settled(sandbox_id, 20)
    assert settled is not None
    return settled.state


class Clock:
    """Monotonic, put on by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# -- with the slot -------------------------------------------------------------------------------------------------


async def test_a_slot_is_taken_with_the_policy_of_the_creation(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle, LISTED)
    assert host.network.policies[sandbox.id] == LISTED
    assert "set_policy" not in host.calls, "it has never been open"
    assert stored(host, sandbox.id).policy == LISTED
    assert in_force(host, lifecycle, sandbox.id)
    assert (await lifecycle.start_create("two", SandboxSpec())).id != sandbox.id
    assert changes(host) == []


async def test_the_slots_addresses_stand_in_the_row(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = GuestAddress("10.64.0.2", 16, "10.64.0.1", "10.64.0.1")

    async def ensure_slot(sandbox_id: str, lease: int, policy: NetworkPolicy) -> NetworkAttachment:
        host.network.slots[sandbox_id] = NetworkAttachment("tap", "02:00:00:00:00:01", guest)
        return host.network.slots[sandbox_id]

    monkeypatch.setattr(host.network, "ensure_slot", ensure_slot)
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    assert (stored(host, sandbox.id).address, stored(host, sandbox.id).gateway) == ("10.64.0.2", "10.64.0.1")
    # A failed creation gives its slot back, and the addresses with it.
    host.faults.fail_next("ensure_started")
    failed = await lifecycle.start_create("two", SandboxSpec())
    assert await settle(lifecycle, failed.id) is SandboxState.FAILED
    assert stored(host, failed.id) == SandboxNetwork(OPEN_POLICY, False, None, "", "")


@pytest.mark.parametrize("way", ["start", "restart"])
async def test_a_start_takes_the_policy_of_that_moment(host: Host, way: str) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    if way == "start":
        await lifecycle.stop(sandbox.id)
        assert await settle(lifecycle, sandbox.id) is SandboxState.STOPPED
    # As after a reboot of the host: the lease is there, the slot is not.
    await host.network.ensure_slot_absent(sandbox.id)
    await lifecycle.network_policies.change(sandbox.id, to(LISTED))
    assert sandbox.id not in host.network.policies
    assert in_force(host, lifecycle, sandbox.id)
    if way == "start":
        await lifecycle.start(sandbox.id)
    else:
        await lifecycle.stop(sandbox.id, then_start=True)
    assert await settle(lifecycle, sandbox.id) is SandboxState.RUNNING
    assert host.network.policies[sandbox.id] == LISTED


async def test_a_change_while_the_slot_is_taken_waits_and_wins(host: Host) -> None:
    """Whatever the order in which the two reach the driver, the newer policy is the last."""
    lifecycle = host.lifecycle()
    host.hang("ensure_slot")
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await host.reach("ensure_slot")
    change = asyncio.create_task(lifecycle.network_policies.change(sandbox.id, to(LISTED)))
    await until(lambda: stored(host, sandbox.id).policy == LISTED)
    assert not in_force(host, lifecycle, sandbox.id)
    host.faults.release("ensure_slot")
    await change
    assert await settle(lifecycle, sandbox.id) is SandboxState.RUNNING
    assert host.network.policies[sandbox.id] == LISTED
    assert in_force(host, lifecycle, sandbox.id)


# -- live ----------------------------------------------------------------------------------------------------------


async def test_a_live_change_is_written_told_and_in_force(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    await lifecycle.network_policies.change(sandbox.id, to(LISTED))
    assert host.network.policies[sandbox.id] == LISTED
    assert changes(host) == [
        {
            "name": "one",
            "egress_mode": "list",
            "networks": 1,
            "domains": 1,
            "download_kbit_per_second": 10_000,
            "upload_kbit_per_second": None,
        }
    ]
    await lifecycle.network_policies.change(sandbox.id, to(LISTED))
    assert len(changes(host)) == 1, "nothing has changed"
    assert host.calls.count("set_policy") == 2, "but it was asked for"


async def test_changes_at_once_lose_nothing(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle, CLOSED_POLICY)
    host.faults.delay_seconds = 0.001
    names = [f"n{number}.example.com" for number in range(40)]
    await asyncio.gather(*(lifecycle.network_policies.change(sandbox.id, allowing(name)) for name in names))
    assert stored(host, sandbox.id).policy.egress.domains == tuple(sorted(names))
    assert host.network.policies[sandbox.id] == stored(host, sandbox.id).policy
    assert in_force(host, lifecycle, sandbox.id)


async def test_states(host: Host) -> None:
    lifecycle = host.lifecycle()
    policies = lifecycle.network_policies
    with pytest.raises(NotFoundError):
        await policies.change("absent", to(LISTED))
    sandbox = await created(host, lifecycle)
    await lifecycle.stop(sandbox.id)
    await settle(lifecycle, sandbox.id)
    await policies.change(sandbox.id, to(LISTED))
    assert host.network.policies[sandbox.id] == LISTED, "a stopped one keeps its slot"
    host.faults.fail_next("ensure_started")
    failed = await lifecycle.start_create("two", SandboxSpec())
    assert await settle(lifecycle, failed.id) is SandboxState.FAILED
    before = host.calls.count("set_policy")
    await policies.change(failed.id, to(LISTED))
    assert host.calls.count("set_policy") == before, "without a slot it is stored, and that is all"
    assert in_force(host, lifecycle, failed.id)
    host.hang("ensure_volume_absent")
    await lifecycle.destroy(sandbox.id, wait=False)
    await host.reach("ensure_volume_absent")
    with pytest.raises(ConflictError) as refused:
        await policies.change(sandbox.id, to(OPEN_POLICY))
    assert refused.value.code == "invalid_state"
    host.faults.release("ensure_volume_absent")


async def test_an_edit_that_is_refused_changes_nothing(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle, LISTED)
    with pytest.raises(InvalidRequestError):
        await lifecycle.network_policies.change(sandbox.id, allowing("a.*.com"))
    assert stored(host, sandbox.id).policy == LISTED
    assert "set_policy" not in host.calls
    assert in_force(host, lifecycle, sandbox.id)


async def test_where_there_is_no_way_out_only_words_of_it_are_taken(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(host.network), "enforces_policies", False)
    lifecycle = host.lifecycle()
    for policy in (LISTED, NetworkPolicy(upload_kbit_per_second=64)):
        with pytest.raises(PreconditionError) as refused:
            await lifecycle.start_create("one", SandboxSpec(), policy)
        assert refused.value.code == "network_closed"
        assert "atelier doctor" in refused.value.hint
    sandbox = await created(host, lifecycle, CLOSED_POLICY)
    with pytest.raises(PreconditionError):
        await lifecycle.network_policies.change(sandbox.id, to(LISTED))
    await lifecycle.network_policies.change(sandbox.id, to(OPEN_POLICY))
    assert stored(host, sandbox.id).policy == OPEN_POLICY


# -- when the network fails ----------------------------------------------------------------------------------------


async def refused_for_now(lifecycle: SandboxLifecycle, sandbox_id: str, policy: NetworkPolicy) -> TransientError:
    with pytest.raises(TransientError) as refused:
        await lifecycle.network_policies.change(sandbox_id, to(policy))
    assert refused.value.code == "network_policy_pending"
    assert "stored and not yet in force" in refused.value.message
    assert "atelier network show one" in refused.value.hint
    return refused.value


@pytest.mark.parametrize("error", [UNREACHABLE, HostError("nft says no", code="host_error")], ids=["gone", "refuses"])
async def test_what_fails_is_stored_and_tried_again_with_growing_pauses(host: Host, error: AtelierError) -> None:
    lifecycle = host.lifecycle()
    policies = lifecycle.network_policies
    policies._clock = clock = Clock()
    sandbox = await created(host, lifecycle)
    host.faults.fail_next("set_policy", error, times=4)
    assert error.message in (await refused_for_now(lifecycle, sandbox.id, LISTED)).message
    assert stored(host, sandbox.id).policy == LISTED
    assert not in_force(host, lifecycle, sandbox.id)
    assert host.network.policies[sandbox.id] == OPEN_POLICY
    assert len(changes(host)) == 1
    tries: list[float] = []
    for _ in range(40):
        before = host.calls.count("set_policy")
        await policies.enforce_pending()
        if host.calls.count("set_policy") > before:
            tries.append(clock.now - 1000)
        clock.now += 0.5
    assert tries == [0, 1, 3, 7]
    assert host.network.policies[sandbox.id] == LISTED
    assert in_force(host, lifecycle, sandbox.id)


async def test_a_new_order_does_not_wait_for_the_pause(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    host.faults.fail_next("set_policy", UNREACHABLE)
    await refused_for_now(lifecycle, sandbox.id, LISTED)
    await lifecycle.network_policies.change(sandbox.id, to(CLOSED_POLICY))
    assert host.network.policies[sandbox.id] == CLOSED_POLICY
    assert in_force(host, lifecycle, sandbox.id)


async def test_a_network_that_hangs_holds_nobody_for_long(host: Host) -> None:
    lifecycle = host.lifecycle()
    policies = lifecycle.network_policies
    policies._enforce_seconds = 0.05
    sandbox = await created(host, lifecycle)
    host.hang("set_policy")
    assert "within 0.05 s" in (await refused_for_now(lifecycle, sandbox.id, LISTED)).message
    await policies.enforce_pending()
    assert not in_force(host, lifecycle, sandbox.id)
    # Neither a stop nor the end of the sandbox waits for it.
    await lifecycle.stop(sandbox.id)
    assert await settle(lifecycle, sandbox.id) is SandboxState.STOPPED
    host.faults.release("set_policy")
    policies._failures.clear()
    await policies.enforce_pending()
    assert host.network.policies[sandbox.id] == LISTED
    assert in_force(host, lifecycle, sandbox.id)


async def test_a_defect_of_the_driver_leaves_it_stored_and_the_loop_alive(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    other = await host.created(lifecycle, "other")

    async def crash(sandbox_id: str, policy: NetworkPolicy) -> None:
        if sandbox_id == sandbox.id:
            raise RuntimeError("a defect")
        host.network.policies[sandbox_id] = policy

    with monkeypatch.context() as patch:
        patch.setattr(host.network, "set_policy", crash)
        with pytest.raises(RuntimeError):
            await lifecycle.network_policies.change(sandbox.id, to(LISTED))
        host.network.policies[other.id] = LISTED
        lifecycle.network_policies.doubt_all()
        await lifecycle.network_policies.enforce_pending()
        assert host.network.policies[other.id] == OPEN_POLICY
        assert in_force(host, lifecycle, other.id)
        assert not in_force(host, lifecycle, sandbox.id)
    lifecycle.network_policies._failures.clear()
    await lifecycle.network_policies.enforce_pending()
    assert host.network.policies[sandbox.id] == LISTED


async def test_a_caller_that_goes_away_stops_nothing(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    host.hang("set_policy")
    change = asyncio.create_task(lifecycle.network_policies.change(sandbox.id, to(LISTED)))
    await host.reach("set_policy")
    change.cancel()
    with pytest.raises(asyncio.CancelledError):
        await change
    host.faults.release("set_policy")
    await until(lambda: in_force(host, lifecycle, sandbox.id))
    assert host.network.policies[sandbox.id] == LISTED


async def test_destroying_ends_the_trying(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    host.faults.fail_next("set_policy", UNREACHABLE)
    await refused_for_now(lifecycle, sandbox.id, LISTED)
    await lifecycle.destroy(sandbox.id)
    before = host.calls.count("set_policy")
    await lifecycle.network_policies.enforce_pending()
    assert host.calls.count("set_policy") == before
    assert lifecycle.network_policies._failures == {}
    assert lifecycle.network_policies._doubts == {}


# -- a new manager, a new network holder ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["in order", "in the middle of it"])
async def test_the_next_manager_brings_it_into_force(host: Host, end: str) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    if end == "in order":
        host.faults.fail_next("set_policy", UNREACHABLE)
        await refused_for_now(lifecycle, sandbox.id, LISTED)
        await lifecycle.close()
    else:
        host.hang("set_policy")
        change = asyncio.create_task(lifecycle.network_policies.change(sandbox.id, to(LISTED)))
        await host.reach("set_policy")
        await lifecycle.close()
        await asyncio.gather(change, return_exceptions=True)
        host.faults.release("set_policy")
    assert host.network.policies[sandbox.id] == OPEN_POLICY
    again = host.lifecycle()
    assert not in_force(host, again, sandbox.id)
    await again.recover()
    await until(lambda: in_force(host, again, sandbox.id))
    assert host.network.policies[sandbox.id] == LISTED


@pytest.mark.parametrize("begun_anew", ["manager", "network holder"])
async def test_all_policies_are_given_again(host: Host, begun_anew: str) -> None:
    lifecycle = host.lifecycle()
    one = await created(host, lifecycle, LISTED)
    two = await host.created(lifecycle, "two")
    host.network.policies = {one.id: CLOSED_POLICY, two.id: CLOSED_POLICY}
    if begun_anew == "manager":
        await lifecycle.close()
        lifecycle = host.lifecycle()
        host.faults.fail_next("set_policy", UNREACHABLE, times=2)
        await lifecycle.recover()
        await until(lambda: host.calls.count("set_policy") == 2)
        assert not in_force(host, lifecycle, one.id), "it failed, and is in doubt until it does not"
        lifecycle.network_policies._failures.clear()
    else:
        lifecycle.network_policies.doubt_all()
        assert not in_force(host, lifecycle, one.id)
    await lifecycle.network_policies.enforce_pending()
    assert host.network.policies == {one.id: LISTED, two.id: OPEN_POLICY}
    assert in_force(host, lifecycle, one.id)
    assert in_force(host, lifecycle, two.id)


async def test_a_holder_that_ends_while_it_is_told_is_told_again(host: Host) -> None:
    lifecycle = host.lifecycle()
    sandbox = await created(host, lifecycle)
    host.hang("set_policy")
    change = asyncio.create_task(lifecycle.network_policies.change(sandbox.id, to(LISTED)))
    await host.reach("set_policy")
    lifecycle.network_policies.doubt_all()
    host.faults.release("set_policy")
    await change
    assert not in_force(host, lifecycle, sandbox.id), "which holder has taken it?"
    await lifecycle.network_policies.enforce_pending()
    assert in_force(host, lifecycle, sandbox.id)
