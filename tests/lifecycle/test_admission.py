"""Room that is measured: what the kernel and the disk could give, and what was promised of it."""

from __future__ import annotations

import asyncio

import pytest
from tests.lifecycle.conftest import Host

from atelier.drivers.storage.fake import FakeStorage
from atelier.lifecycle.admission import Capacity, RoomPolicy
from atelier.model.errors import CapacityError
from atelier.model.sandbox import SandboxSpec

MIB = 2**20


async def refused(host: Host, policy: RoomPolicy, count: int, **spec: int) -> int:
    """How many of so many creates at once are refused."""
    lifecycle = host.lifecycle(room=policy)
    wishes = (lifecycle.start_create(f"n{number}", SandboxSpec(**spec)) for number in range(count))
    results = await asyncio.gather(*wishes, return_exceptions=True)
    assert all(isinstance(each, CapacityError) for each in results if isinstance(each, BaseException))
    return sum(isinstance(each, CapacityError) for each in results)


async def test_memory_that_is_there_now(host: Host) -> None:
    policy = RoomPolicy(memory_available_bytes=lambda: 3000 * MIB, memory_reserve_mib=900)
    assert await refused(host, policy, 20, memory_mib=512) == 16
    lifecycle = host.lifecycles[-1]
    with pytest.raises(CapacityError) as short:
        await lifecycle.start_create("late", SandboxSpec(memory_mib=512))
    assert "memory: 512 MiB asked for, 52 MiB of 2100 MiB free, 460 MiB short" in short.value.message


async def test_what_our_machines_occupy_is_counted_once(host: Host) -> None:
    """Four machines of 512 MiB have touched all of theirs: the kernel has so much less, and nothing else changes."""
    available = 3000
    policy = RoomPolicy(memory_available_bytes=lambda: available * MIB, memory_reserve_mib=900)
    assert await refused(host, policy, 4, memory_mib=512) == 0
    lifecycle = host.lifecycles[-1]
    await host.fleet(lifecycle).drain(30)
    host.vmm.machine_resident_bytes = 512 * MIB
    available -= 4 * 512
    with pytest.raises(CapacityError):
        await lifecycle.start_create("fifth", SandboxSpec(memory_mib=128))
    available += 128
    await lifecycle.start_create("fifth", SandboxSpec(memory_mib=128))


async def test_memory_that_somebody_else_takes_is_seen(host: Host) -> None:
    available = 3000
    policy = RoomPolicy(memory_available_bytes=lambda: available * MIB)
    assert await refused(host, policy, 1, memory_mib=512) == 0
    available = 600
    with pytest.raises(CapacityError, match="memory"):
        await host.lifecycles[-1].start_create("two", SandboxSpec(memory_mib=512))


async def test_disk_is_promised_in_full_or_as_often_as_is_said(host: Host) -> None:
    host.storage = FakeStorage(host.faults, capacity_bytes=20_000 * MIB)
    assert await refused(host, RoomPolicy(disk_overcommit=1, disk_reserve_mib=1000), 10, disk_mib=4096) == 6
    await host.fleet(host.lifecycles[-1]).destroy_all()
    assert await refused(host, RoomPolicy(disk_overcommit=2, disk_reserve_mib=1000), 10, disk_mib=4096) == 1
    with pytest.raises(CapacityError, match="disk"):
        await host.lifecycles[-1].start_create("late", SandboxSpec())


async def test_slots(host: Host) -> None:
    assert await refused(host, RoomPolicy(fixed=Capacity(slots=3)), 5) == 2


async def test_a_fixed_limit_and_a_measured_one(host: Host) -> None:
    policy = RoomPolicy(memory_available_bytes=lambda: 10_000 * MIB, fixed=Capacity(memory_mib=1024))
    assert await refused(host, policy, 5, memory_mib=512) == 3
