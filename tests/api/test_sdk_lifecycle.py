"""The lives of ``Sandbox`` and ``AsyncSandbox``: stop, start, resize, time limits, and what goes wrong on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from tests.running_manager import RunningManager

from atelier import AsyncSandbox, Sandbox
from atelier.client.connection import AsyncConnection, Connection
from atelier.client.environment import Endpoint
from atelier.client.sandbox_failures import SandboxFailedError
from atelier.model.errors import ConflictError, HostError, InvalidRequestError, PreconditionError, TimeoutExceededError

from .manager_inside import ManagerInside


@pytest.fixture
def connection(manager: RunningManager, api: httpx.Client) -> Iterator[Connection]:
    del api  # destroys what a test leaves
    with Connection(Endpoint(manager.url, manager.key)) as opened:
        yield opened


def test_a_life(connection: Connection) -> None:
    with Sandbox.create(connection=connection) as box:
        assert box.stop(grace_seconds=5).state == "stopped"
        assert (box.state, box.stop_reason) == ("stopped", "requested")
        with pytest.raises((ConflictError, PreconditionError)) as caught:
            box.run(["true"])
        assert f"atelier start {box.name}" in caught.value.hint
        with pytest.raises(ConflictError) as refused:
            box.stop()
        assert refused.value.code == "invalid_state"
        box.start()
        assert (box.state, box.stop_reason) == ("running", None)
        assert box.run(["true"]).exit_code == 0
        assert box.restart().state == "running"
        assert box.resize(disk_mib=8192).disk_mib == 8192
        with pytest.raises(InvalidRequestError) as shrunk:
            box.resize(disk_mib=4096)
        assert shrunk.value.code == "disk_cannot_shrink"
        with pytest.raises(ConflictError):
            box.retry()
        assert box.stop(wait=False).state in ("stopping", "stopped")


def test_time_limits(connection: Connection) -> None:
    begun = datetime.now(UTC)
    with Sandbox.create(connection=connection, expires_in_seconds=3600, auto_stop_after_idle_seconds=60) as box:
        assert box.expires_at is not None
        assert timedelta(hours=1) <= box.expires_at - begun < timedelta(hours=1, minutes=5)
        assert box.auto_stop_after_idle_seconds == 60
        moment = begun + timedelta(days=1)
        box.set_time_limits(expires_at=moment)
        assert (box.expires_at, box.auto_stop_after_idle_seconds) == (moment, 60)
        box.set_time_limits(auto_stop_after_idle_seconds=None)
        assert (box.expires_at, box.auto_stop_after_idle_seconds) == (moment, None)
        box.set_time_limits(expires_in_seconds=7200)
        assert box.expires_at < moment
        box.set_time_limits(expires_at=None, auto_stop_after_idle_seconds=90)
        assert (box.expires_at, box.auto_stop_after_idle_seconds) == (None, 90)
        for wrong in ({"expires_at": moment, "expires_in_seconds": 5}, {"expires_in_seconds": 1e30}):
            with pytest.raises(InvalidRequestError):
                box.set_time_limits(**wrong)
        with pytest.raises(InvalidRequestError) as past:
            box.set_time_limits(expires_in_seconds=-1)
        assert past.value.code == "expiry_in_past"


@pytest.fixture
async def link(inside: ManagerInside) -> AsyncIterator[AsyncConnection]:
    key = inside.client.headers["Authorization"].removeprefix("Bearer ")
    transport = httpx.ASGITransport(inside.installation.application)
    async with AsyncConnection(Endpoint("http://127.0.0.1", key), transport=transport) as opened:
        yield opened


async def test_the_same_life_on_asyncio(link: AsyncConnection) -> None:
    async with await AsyncSandbox.create(connection=link, expires_in_seconds=60) as box:
        assert (await box.stop()).stop_reason == "requested"
        assert (await box.resize(disk_mib=8192)).disk_mib == 8192
        assert (await box.start()).state == "running"
        assert (await box.restart(grace_seconds=1)).state == "running"
        assert (await box.set_time_limits(expires_at=None)).expires_at is None
        with pytest.raises(ConflictError):
            await box.retry()
    assert await AsyncSandbox.list(connection=link) == []


async def test_a_guest_that_does_not_end_is_cut_off(inside: ManagerInside, link: AsyncConnection) -> None:
    box = await AsyncSandbox.create(connection=link)
    inside.guests.ignores_shut_down = True
    assert (await box.stop(grace_seconds=0.1)).stop_reason == "forced"


async def test_a_wait_ends_in_time_and_says_what_goes_on(inside: ManagerInside, link: AsyncConnection) -> None:
    box = await AsyncSandbox.create(connection=link)
    inside.guests.ignores_shut_down = True
    with pytest.raises(TimeoutExceededError) as caught:
        await box.stop(grace_seconds=2, timeout_seconds=0.1)
    assert f"the sandbox {box.name} was not stopped within 0.1 s" in caught.value.message
    await inside.settle(box.id)
    inside.storage.faults.hang("grow_volume")
    with pytest.raises(TimeoutExceededError) as slow:
        await box.resize(disk_mib=8192, timeout_seconds=0.1)
    assert "was not resized within 0.1 s" in slow.value.message
    inside.storage.faults.release("grow_volume")


async def test_what_is_stuck_is_an_error_with_the_remedy(inside: ManagerInside, link: AsyncConnection) -> None:
    box = await AsyncSandbox.create(connection=link)
    await box.stop()
    inside.storage.faults.fail_next("grow_volume", HostError("the disk is held", hint="let go of it"), times=1000)
    with pytest.raises(SandboxFailedError) as caught:
        await box.resize(disk_mib=8192)
    assert caught.value.code == "resize_stuck"
    assert caught.value.message == f"the sandbox {box.name} is stuck while being resized: the disk is held"
    assert f"atelier retry {box.name}" in caught.value.hint
    await box.refresh()
    assert box.failure is not None
    inside.storage.faults._failures.clear()
    assert (await box.retry()).failure is None


async def test_a_start_that_fails_says_why(inside: ManagerInside, link: AsyncConnection) -> None:
    box = await AsyncSandbox.create(connection=link)
    await box.stop()
    inside.guests.faults.fail_next("initialize", HostError("no luck"), times=1)
    with pytest.raises(SandboxFailedError) as caught:
        await box.start()
    assert f"the sandbox {box.name} failed: no luck" in caught.value.message
    assert (await box.refresh()).state == "failed"
    assert (await box.start()).state == "running"
