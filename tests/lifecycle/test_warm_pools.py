"""Warm pools on fakes: filled, taken from, refilled, drained; what waits gives way, and nothing is taken twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tests.lifecycle.conftest import Host

from atelier.db.sandboxes import SandboxRepository
from atelier.lifecycle.admission import Capacity, RoomPolicy
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.lifecycle.warm_pools import PoolState
from atelier.model.errors import CapacityError, ConflictError, HostError, NotFoundError
from atelier.model.network_policy import CLOSED_POLICY
from atelier.model.sandbox import Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.states import SandboxState
from atelier.model.warm_pool import WarmPool


def pooled(host: Host) -> list[Sandbox]:
    with host.database.read() as connection:
        return [each for each in SandboxRepository().list_in(connection) if each.purpose is SandboxPurpose.POOL]


def ready(host: Host) -> set[str]:
    return {each.id for each in pooled(host) if each.state is SandboxState.RUNNING}


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.005)


async def filled(host: Host, lifecycle: SandboxLifecycle, size: int, **sizes: int) -> set[str]:
    """Ids of those that stand ready once there are so many."""
    spec = SandboxSpec(**sizes)  # type: ignore[arg-type]
    await lifecycle.warm_pools.set_size(WarmPool("base", spec.vcpu_count, spec.memory_mib, size))
    await until(lambda: len(ready(host)) == len(pooled(host)) == size)
    return ready(host)


def warmed_by(host: Host) -> list[str]:
    """Programs that were run as a guest's default user."""
    return [each.arguments[0] for each in host.guests.processes if not each.user]


def only_state(lifecycle: SandboxLifecycle) -> PoolState:
    (state,) = lifecycle.warm_pools.list_states()
    return state


async def running(lifecycle: SandboxLifecycle, sandbox: Sandbox) -> Sandbox:
    settled = await lifecycle.wait_settled(sandbox.id, 20)
    assert settled is not None
    assert settled.state is SandboxState.RUNNING, settled.failure_message
    return settled


async def test_a_create_takes_one_and_the_pool_is_filled_again(host: Host) -> None:
    lifecycle = host.lifecycle()
    other = await host.created(lifecycle, "other")
    before = await filled(host, lifecycle, 2)
    assert only_state(lifecycle) == PoolState(WarmPool("base", 1, 512, 2), ready=2, coming=0, trouble=None)
    begun = await host.begun(lifecycle, "one", environment={"A": "1"}, labels={"team": "web"})
    assert begun.id in before
    assert begun.state is SandboxState.CREATING
    taken = await running(lifecycle, begun)
    assert (taken.name, taken.purpose, taken.spec.environment, taken.spec.labels) == (
        "one",
        SandboxPurpose.USER,
        {"A": "1"},
        {"team": "web"},
    )
    identity = host.guests._guests[taken.id].identity
    assert identity is not None
    assert (identity.hostname, identity.environment) == ("one", {"A": "1"})
    assert taken.created_at > other.created_at
    with host.database.read() as connection:
        listed, _ = SandboxRepository().list_page(connection, 10)
    assert [each.name for each in listed] == ["one", "other"], "those in the pool are in nobody's list"
    await until(lambda: len(ready(host)) == 2)
    assert taken.id not in ready(host)
    await lifecycle.destroy(taken.id)
    await lifecycle.destroy(other.id)
    await lifecycle.warm_pools.set_size(WarmPool("base", 1, 512, 0))
    assert host.held() == []


async def test_one_is_warmed_before_it_is_ready_and_only_there(host: Host) -> None:
    lifecycle = host.lifecycle()
    host.hang("start_process")
    await lifecycle.warm_pools.set_size(WarmPool("base", 1, 512, 1))
    await host.reach("start_process")
    state = only_state(lifecycle)
    assert (state.ready, state.coming) == (0, 1)
    booted = await host.begun(lifecycle, "impatient")
    assert booted.id not in {each.id for each in pooled(host)}
    host.faults.release("start_process")
    await running(lifecycle, booted)
    await until(lambda: len(ready(host)) == 1)
    assert warmed_by(host) == ["true", "sh", "bash", "python3", "true"], "in the pool's own only"
    (waiting,) = pooled(host)
    assert host.calls.count("rename") == 1, "what giving it away takes was done once, too"
    taken = await running(lifecycle, await host.begun(lifecycle, "one"))
    assert taken.id == waiting.id


async def test_an_image_without_these_programs_waits_as_well(host: Host) -> None:
    lifecycle = host.lifecycle()
    for _ in range(5):
        host.faults.fail_next("start_process", NotFoundError("not in PATH", code="program_not_found"))
    await filled(host, lifecycle, 1)
    assert warmed_by(host) == []


async def test_a_manager_that_ends_while_one_is_warmed(host: Host) -> None:
    lifecycle = host.lifecycle()
    host.hang("start_process")
    await lifecycle.warm_pools.set_size(WarmPool("base", 1, 512, 1))
    await host.reach("start_process")
    (coming,) = pooled(host)
    await lifecycle.close()
    host.faults.release("start_process")
    after = host.lifecycle()
    await after.recover()
    await until(lambda: ready(host) == {coming.id})
    assert len(warmed_by(host)) == 5


async def test_many_creates_at_once_take_each_one_once(host: Host) -> None:
    lifecycle = host.lifecycle()
    before = await filled(host, lifecycle, 8)
    begun = await asyncio.gather(*(host.begun(lifecycle, f"n{number}") for number in range(20)))
    ids = [each.id for each in begun]
    assert len(set(ids)) == 20
    assert before <= set(ids), "one that waited was passed over"
    for each in begun:
        settled = await running(lifecycle, each)
        identity = host.guests._guests[settled.id].identity
        assert identity is not None
        assert identity.hostname == settled.name
    await until(lambda: len(ready(host)) == 8)
    assert not ready(host) & set(ids)


async def test_a_name_that_is_taken_leaves_the_pool_alone(host: Host) -> None:
    lifecycle = host.lifecycle()
    await host.created(lifecycle, "one")
    before = await filled(host, lifecycle, 1)
    with pytest.raises(ConflictError) as refused:
        await host.begun(lifecycle, "one")
    assert refused.value.code == "name_taken"
    assert ready(host) == before


@pytest.mark.parametrize("spec", [{"vcpu_count": 2}, {"memory_mib": 1024}, {"disk_mib": 8192}, {"image": "other"}])
async def test_another_kind_is_not_taken(host: Host, spec: dict[str, int]) -> None:
    lifecycle = host.lifecycle()
    before = await filled(host, lifecycle, 1)
    await host.created(lifecycle, **spec)
    assert ready(host) == before


async def test_a_network_policy_of_its_own_is_not_given_to_one_that_waited(host: Host) -> None:
    lifecycle = host.lifecycle()
    before = await filled(host, lifecycle, 1)
    await running(lifecycle, await lifecycle.start_create("one", SandboxSpec(), CLOSED_POLICY))
    assert ready(host) == before


async def test_a_pool_shrinks_and_drains(host: Host) -> None:
    lifecycle = host.lifecycle()
    before = await filled(host, lifecycle, 5)
    after = await filled(host, lifecycle, 2)
    assert after < before
    await lifecycle.warm_pools.set_size(WarmPool("base", 1, 512, 0))
    assert lifecycle.warm_pools.list_states() == []
    assert pooled(host) == []
    assert host.held() == []


async def test_one_whose_machine_ends_is_replaced(host: Host) -> None:
    lifecycle = host.lifecycle()
    before = await filled(host, lifecycle, 2)
    host.vmm.end_machine(sorted(before)[0])
    await until(lambda: len(ready(host)) == 1)
    await lifecycle.warm_pools.keep()
    await until(lambda: len(ready(host)) == len(pooled(host)) == 2)
    assert len(before & ready(host)) == 1


async def test_a_new_image_makes_the_old_ones_go(host: Host) -> None:
    lifecycle = host.lifecycle()
    before = await filled(host, lifecycle, 2)
    host.images.build = "fedcba9876543210"
    made = await running(lifecycle, await host.begun(lifecycle, "one"))
    assert made.id not in before, "no create gets yesterday's image"
    await lifecycle.warm_pools.keep()
    await until(lambda: len(ready(host)) == 2)
    assert {each.spec.image_id for each in pooled(host)} == {"base-fedcba9876543210"}


async def test_a_pool_that_does_not_fit_says_so_and_gives_way(host: Host) -> None:
    lifecycle = host.lifecycle(room=RoomPolicy(fixed=Capacity(memory_mib=4 * 512)))
    await lifecycle.warm_pools.set_size(WarmPool("base", 1, 512, 9))
    await until(lambda: len(ready(host)) == 4)
    state = only_state(lifecycle)
    assert (state.ready, state.coming) == (4, 0)
    assert state.trouble is not None
    assert state.trouble.code == "insufficient_capacity"
    with pytest.raises(CapacityError):
        await host.begun(lifecycle, "hopeless", memory_mib=5 * 512)
    assert len(ready(host)) == 4, "nothing goes for what would not fit even so"
    large = await running(lifecycle, await host.begun(lifecycle, "large", memory_mib=3 * 512))
    await until(lambda: len(pooled(host)) == 1)
    await lifecycle.warm_pools.keep()
    assert len(pooled(host)) == 1
    await lifecycle.destroy(large.id)
    await lifecycle.warm_pools.keep()
    await until(lambda: len(ready(host)) == 4)


async def test_it_gives_way_to_a_start_and_to_many_creates_at_once(host: Host) -> None:
    lifecycle = host.lifecycle(room=RoomPolicy(fixed=Capacity(memory_mib=6 * 512)))
    stopped = await host.created(lifecycle, "stopped", memory_mib=1024)
    await lifecycle.stop(stopped.id)
    await lifecycle.wait_settled(stopped.id, 20)
    await filled(host, lifecycle, 6)
    await running(lifecycle, await lifecycle.start(stopped.id))
    assert len(ready(host)) == 4
    specs = {"vcpu_count": 2}
    begun = await asyncio.gather(
        *(host.begun(lifecycle, f"n{number}", **specs) for number in range(5)), return_exceptions=True
    )
    assert sum(isinstance(each, CapacityError) for each in begun) == 1
    for each in begun:
        if not isinstance(each, BaseException):
            await running(lifecycle, each)
    assert pooled(host) == []


async def test_a_guest_that_does_not_take_its_name_leaves_nothing(host: Host) -> None:
    lifecycle = host.lifecycle()
    waiting = await lifecycle.start_create("pool-one", SandboxSpec(), purpose=SandboxPurpose.POOL)
    await running(lifecycle, waiting)
    host.faults.fail_next("rename", HostError("no", code="on_purpose"))
    taken = await host.created(lifecycle, "one")
    assert taken.id == waiting.id
    assert (taken.state, taken.failure_code, taken.holds_volume) == (SandboxState.FAILED, "on_purpose", False)
    assert host.held_without_consoles() == []
    await running(lifecycle, await lifecycle.start(taken.id))
    await lifecycle.destroy(taken.id)
    assert host.held() == []


async def test_what_was_taken_is_not_destroyed_as_pooled(host: Host) -> None:
    lifecycle = host.lifecycle()
    (waiting,) = await filled(host, lifecycle, 1)
    taken = await running(lifecycle, await host.begun(lifecycle))
    assert taken.id == waiting
    with pytest.raises(ConflictError) as refused:
        await lifecycle.destroy(waiting, only=SandboxPurpose.POOL)
    assert refused.value.code == "purpose_changed"
    await running(lifecycle, taken)


async def test_a_pool_outlives_the_manager(host: Host) -> None:
    lifecycle = host.lifecycle()
    before = await filled(host, lifecycle, 2)
    await lifecycle.close()
    after = host.lifecycle()
    await after.recover()
    await after.warm_pools.keep()
    assert ready(host) == before
    taken = await running(after, await host.begun(after))
    assert taken.id in before


async def test_a_manager_that_ends_while_one_is_taken(host: Host) -> None:
    lifecycle = host.lifecycle()
    (waiting,) = await filled(host, lifecycle, 1)
    host.hang("rename")
    taken = await host.begun(lifecycle)
    await host.reach("rename")
    await lifecycle.close()
    host.faults.release("rename")
    after = host.lifecycle()
    await after.recover()
    assert taken.id == waiting
    assert (await running(after, taken)).name == "one"


@pytest.mark.parametrize("what", ["stop_all", "destroy_all"])
async def test_the_end_of_all_sandboxes_is_that_of_the_pools(host: Host, what: str) -> None:
    lifecycle = host.lifecycle()
    await filled(host, lifecycle, 3)
    await getattr(host.fleet(lifecycle), what)()
    await lifecycle.warm_pools.keep()
    assert pooled(host) == []
    assert host.held() == []
    assert only_state(lifecycle).pool.size == 3, "the next manager fills it again"


async def test_why_one_failed_is_told_and_it_is_tried_again(host: Host) -> None:
    lifecycle = host.lifecycle()
    host.faults.fail_next("ensure_started", HostError("no such luck", code="on_purpose"))
    await lifecycle.warm_pools.set_size(WarmPool("base", 1, 512, 1))
    await until(lambda: [each.state for each in pooled(host)] == [SandboxState.FAILED])
    host.hang("ensure_started")
    await lifecycle.warm_pools.keep()
    state = only_state(lifecycle)
    assert (state.ready, state.coming) == (0, 1)
    assert state.trouble is not None
    assert state.trouble.code == "on_purpose"
    host.faults.release("ensure_started")
    await until(lambda: len(ready(host)) == len(pooled(host)) == 1)
    assert only_state(lifecycle).trouble is None
