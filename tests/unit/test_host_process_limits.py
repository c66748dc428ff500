"""Raising what a running process may write, and where that ends."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from atelier.drivers.vmm.disk_growth import file_size_limits
from atelier.host import processes
from atelier.host.process_limits import may_raise_hard_limits, raise_file_size_limit
from atelier.host.processes import ProcessUser, ResourceLimits
from atelier.model.errors import HostError
from atelier.model.machine import ProcessIdentity

MIB = 1024 * 1024


def limits_of(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith("Max file size")).split()[3:5]


async def sleeping(log: Path, limits: ResourceLimits, user: ProcessUser | None = None) -> ProcessIdentity:
    return await processes.start_detached(["sleep", "1000"], stderr_path=log, limits=limits, user=user)


OTHER_USER = pytest.param(
    ProcessUser(54321, 54322), marks=pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
)


@pytest.mark.parametrize("user", [None, OTHER_USER])
async def test_a_limit_is_raised_up_to_its_ceiling_and_never_lowered(tmp_path: Path, user: ProcessUser | None) -> None:
    limits = ResourceLimits(file_size_bytes=1000_000, file_size_ceiling_bytes=5000_000)
    identity = await sleeping(tmp_path / "log", limits, user)
    try:
        assert limits_of(identity.pid) == ["1000000", "5000000"]
        for wanted, soft in ((2000_000, "2000000"), (1500_000, "2000000"), (5000_000, "5000000")):
            await raise_file_size_limit(identity, wanted)
            assert limits_of(identity.pid) == [soft, "5000000"]
        if await may_raise_hard_limits():
            await raise_file_size_limit(identity, 5000_001)
            assert limits_of(identity.pid) == ["5000001", "5000001"]
        else:
            with pytest.raises(HostError) as refusal:
                await raise_file_size_limit(identity, 5000_001)
            assert refusal.value.code == "limit_not_raised"
            assert limits_of(identity.pid) == ["5000000", "5000000"]
    finally:
        await processes.kill_and_wait(identity)


async def test_a_process_without_a_limit_is_left_as_it_is(tmp_path: Path) -> None:
    identity = await sleeping(tmp_path / "log", ResourceLimits())
    try:
        before = limits_of(identity.pid)
        await raise_file_size_limit(identity, 1)
        assert limits_of(identity.pid) == before
    finally:
        await processes.kill_and_wait(identity)


async def test_only_the_process_that_was_meant(tmp_path: Path) -> None:
    identity = await sleeping(tmp_path / "log", ResourceLimits(file_size_bytes=1000, file_size_ceiling_bytes=5000))
    try:
        with pytest.raises(HostError) as refusal:
            await raise_file_size_limit(replace(identity, start_time_ticks=1), 2000)
        assert refusal.value.code == "process_gone"
        assert limits_of(identity.pid) == ["1000", "5000"]
    finally:
        await processes.kill_and_wait(identity)
    with pytest.raises(HostError, match="gone"):
        await raise_file_size_limit(identity, 2000)


def test_limits_of_a_vmm() -> None:
    soft, hard = file_size_limits(4096 * MIB, may_raise_hard_limits=True)
    assert soft == hard
    assert 4096 * MIB < soft < 4200 * MIB
    low, ceiling = file_size_limits(4096 * MIB, may_raise_hard_limits=False)
    assert low == soft
    inherited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if inherited == resource.RLIM_INFINITY:
        assert 16 * 2**40 < ceiling < 17 * 2**40, "the largest disk there can be, and a little"
