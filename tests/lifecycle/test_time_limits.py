"""Expiry and idle stop, on a clock of the test's own; and what counts as use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from tests.lifecycle.conftest import Host

from atelier.lifecycle.activity import Activity
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import HostError, InvalidRequestError
from atelier.model.sandbox import SandboxSpec
from atelier.model.states import SandboxState, StopReason


class Clock:
    def __init__(self) -> None:
        self.at = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.at

    def pass_by(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def state_after(host: Host, lifecycle: SandboxLifecycle, sandbox_id: str) -> SandboxState | None:
    """What an enforcement makes of it, once it has settled."""
    await lifecycle.time_limits.enforce()
    if host.row(sandbox_id) is None:
        return None
    row = host.row(sandbox_id)
    assert row is not None
    if row.state is SandboxState.DESTROYING:
        await lifecycle.destroy(sandbox_id)
        return None
    settled = await lifecycle.wait_settled(sandbox_id, 30)
    assert settled is not None
    return settled.state


async def test_what_has_expired_is_destroyed(host: Host, clock: Clock) -> None:
    lifecycle = host.lifecycle(now=clock)
    sandbox = await host.created(lifecycle, expires_at=clock.at + timedelta(seconds=100))
    other = await host.created(lifecycle, "other")
    clock.pass_by(99)
    assert await state_after(host, lifecycle, sandbox.id) is SandboxState.RUNNING
    clock.pass_by(1)
    await lifecycle.time_limits.enforce()
    for _ in range(3):
        await lifecycle.time_limits.enforce()  # it is being destroyed: nothing more
    assert await state_after(host, lifecycle, sandbox.id) is None
    assert host.held_by(sandbox.id) == set()
    assert host.row(other.id) is not None
    assert host.states().count("destroying") == 1


def expiring(at: datetime | None) -> Callable[[SandboxSpec], SandboxSpec]:
    return lambda spec: replace(spec, expires_at=at)


async def test_expiry_can_be_put_off_and_taken_away(host: Host, clock: Clock) -> None:
    lifecycle = host.lifecycle(now=clock)
    sandbox = await host.created(lifecycle, expires_at=clock.at + timedelta(seconds=100))
    later = clock.at + timedelta(seconds=200)
    row = await lifecycle.set_time_limits(sandbox.id, expiring(later))
    assert row.spec.expires_at == later
    clock.pass_by(150)
    assert await state_after(host, lifecycle, sandbox.id) is SandboxState.RUNNING
    for past in (clock.at, clock.at - timedelta(days=1)):
        with pytest.raises(InvalidRequestError) as refused:
            await lifecycle.set_time_limits(sandbox.id, expiring(past))
        assert refused.value.code == "expiry_in_past"
        with pytest.raises(InvalidRequestError):
            await lifecycle.start_create("late", SandboxSpec(expires_at=past))
    await lifecycle.set_time_limits(sandbox.id, expiring(None))
    clock.pass_by(10**6)
    assert await state_after(host, lifecycle, sandbox.id) is SandboxState.RUNNING


async def test_a_stopped_one_expires_too(host: Host, clock: Clock) -> None:
    lifecycle = host.lifecycle(now=clock)
    sandbox = await host.created(lifecycle, expires_at=clock.at + timedelta(seconds=100))
    await lifecycle.stop(sandbox.id)
    await lifecycle.wait_settled(sandbox.id, 30)
    clock.pass_by(101)
    assert await state_after(host, lifecycle, sandbox.id) is None
    assert host.held() == []


async def test_what_nobody_uses_is_stopped(host: Host, clock: Clock) -> None:
    lifecycle = host.lifecycle(now=clock)
    sandbox = await host.created(lifecycle, auto_stop_after_idle_seconds=60)
    other = await host.created(lifecycle, "other")
    clock.pass_by(59)
    assert await state_after(host, lifecycle, sandbox.id) is SandboxState.RUNNING
    lifecycle.activity.touch(sandbox.id)
    clock.pass_by(59)
    assert await state_after(host, lifecycle, sandbox.id) is SandboxState.RUNNING
    with lifecycle.activity.in_use(sandbox.id):
        clock.pass_by(10**6)
        assert await state_after(host, lifecycle, sandbox.id) is SandboxState.RUNNING
    clock.pass_by(61)
    assert await state_after(host, lifecycle, sandbox.id) is SandboxState.STOPPED
    row, untouched = host.row(sandbox.id), host.row(other.id)
    assert row is not None
    assert untouched is not None
    assert (row.stop_reason, untouched.state) == (StopReason.IDLE, SandboxState.RUNNING)
    # Started again it has its full time.
    await lifecycle.start(sandbox.id)
    await lifecycle.wait_settled(sandbox.id, 30)
    clock.pass_by(59)
    assert await state_after(host, lifecycle, sandbox.id) is SandboxState.RUNNING


async def test_use_is_written_down_and_a_new_manager_gives_time(host: Host, clock: Clock) -> None:
    lifecycle = host.lifecycle(now=clock)
    sandbox = await host.created(lifecycle, auto_stop_after_idle_seconds=1000)
    created_at = clock.at
    clock.pass_by(30)
    lifecycle.activity.touch(sandbox.id)
    await lifecycle.time_limits.enforce()
    row = host.row(sandbox.id)
    assert row is not None
    assert row.last_active_at == created_at, "not at each keystroke"
    clock.pass_by(40)
    lifecycle.activity.touch(sandbox.id)
    await lifecycle.time_limits.enforce()
    row = host.row(sandbox.id)
    assert row is not None
    assert row.last_active_at == clock.at
    await lifecycle.close()
    clock.pass_by(5000)
    again = host.lifecycle(now=clock)
    await again.recover()
    assert await state_after(host, again, sandbox.id) is SandboxState.RUNNING
    clock.pass_by(1000)
    assert await state_after(host, again, sandbox.id) is SandboxState.STOPPED


async def test_one_that_cannot_be_ended_now_keeps_no_other_waiting(host: Host, clock: Clock) -> None:
    lifecycle = host.lifecycle(now=clock)
    limit = clock.at + timedelta(seconds=10)
    busy = await host.created(lifecycle, "busy", auto_stop_after_idle_seconds=10)
    host.hang("resize_disk")
    await lifecycle.resize(busy.id, 8192)
    await host.reach("resize_disk")
    expired = await host.created(lifecycle, "expired", expires_at=limit)
    clock.pass_by(11)
    assert await state_after(host, lifecycle, expired.id) is None
    host.faults.release("resize_disk")
    await lifecycle.wait_settled(busy.id, 30)
    assert await state_after(host, lifecycle, busy.id) is SandboxState.STOPPED


async def test_a_clock_that_cannot_be_set_concerns_one_sandbox(host: Host) -> None:
    lifecycle = host.lifecycle()
    await host.created(lifecycle)
    await host.created(lifecycle, "two")
    host.faults.fail_next("synchronize_clock", HostError("no"))
    await host.fleet(lifecycle).keep_clocks()
    assert host.calls.count("synchronize_clock") == 2


def test_activity(clock: Clock) -> None:
    activity = Activity(clock)
    started = clock.at
    clock.pass_by(10)
    assert activity.last_active_at("a", None) == started
    assert activity.last_active_at("a", started + timedelta(seconds=5)) == started + timedelta(seconds=5)
    with activity.in_use("a"):
        with activity.in_use("a"):
            clock.pass_by(10)
        clock.pass_by(10)
        assert activity.last_active_at("a", None) == clock.at
    ended = clock.at
    clock.pass_by(10)
    assert activity.last_active_at("a", None) == ended
    activity.forget("a")
    assert activity.last_active_at("a", None) == started
