"""Stop, start, restart, resize, retry, time limits and the host over the API, with guests that hang when told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from atelier.db.sagas import list_open_sagas_of
from atelier.db.sandboxes import SandboxRepository
from atelier.model.errors import HostError

from .manager_inside import ManagerInside
from .test_sandbox_routes import SANDBOXES, assert_error

WAIT = {"wait": True}


@pytest.fixture
async def box(inside: ManagerInside) -> str:
    """Id of a running sandbox called ``box``."""
    return (await create(inside, name="box"))["id"]


async def create(inside: ManagerInside, **body: Any) -> dict[str, Any]:
    answer = await inside.client.post(SANDBOXES, params=WAIT, json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def order(inside: ManagerInside, verb: str, *, wait: bool = True, **body: Any) -> httpx.Response:
    return await inside.client.post(f"{SANDBOXES}/box/{verb}", params={"wait": wait}, json=body or None)


async def get(inside: ManagerInside, reference: str = "box") -> dict[str, Any]:
    answer = await inside.client.get(f"{SANDBOXES}/{reference}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def until_gone(inside: ManagerInside, reference: str = "box") -> None:
    async with asyncio.timeout(20):
        while (await inside.client.get(f"{SANDBOXES}/{reference}")).status_code != 404:
            await asyncio.sleep(0.01)


# -- stop, start, restart -----------------------------------------------------------------------------------------


async def test_stop_and_start(inside: ManagerInside, box: str) -> None:
    stopped = await order(inside, "stop")
    assert stopped.status_code == 200
    assert (stopped.json()["state"], stopped.json()["stop_reason"]) == ("stopped", "requested")
    started = await order(inside, "start")
    assert started.status_code == 200
    assert (started.json()["id"], started.json()["state"], started.json()["stop_reason"]) == (box, "running", None)


async def test_what_runs_is_not_started_and_what_is_stopped_not_stopped(inside: ManagerInside, box: str) -> None:
    assert_error(await order(inside, "start"), 409, "invalid_state")
    await order(inside, "stop")
    for verb in ("stop", "restart"):
        assert_error(await order(inside, verb), 409, "invalid_state")
    for verb in ("start", "stop", "restart", "retry"):
        assert_error(await inside.client.post(f"{SANDBOXES}/absent/{verb}"), 404, "sandbox_not_found")


async def test_stop_twice_is_one_stop(inside: ManagerInside, box: str) -> None:
    inside.guests.ignores_shut_down = True
    answers = [await order(inside, "stop", wait=False, grace_seconds=1) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert {answer.json()["state"] for answer in answers} == {"stopping"}
    with inside.installation.fleet._database.read() as connection:
        assert [record.kind for record in list_open_sagas_of(connection, box)] == ["sandbox_stop"]
    await inside.settle(box)
    assert (await get(inside))["stop_reason"] == "forced"


async def test_a_wait_that_is_too_short_says_so(inside: ManagerInside, box: str) -> None:
    inside.guests.ignores_shut_down = True
    answer = await inside.client.post(
        f"{SANDBOXES}/box/stop", params={"wait": True, "timeout_seconds": 0.05}, json={"grace_seconds": 1}
    )
    assert (answer.status_code, answer.json()["state"]) == (202, "stopping")
    assert_error(await order(inside, "start"), 409, "invalid_state")


async def test_restart(inside: ManagerInside, box: str) -> None:
    answer = await order(inside, "restart", grace_seconds=5)
    assert (answer.status_code, answer.json()["state"]) == (200, "running")
    assert answer.json()["id"] == box


async def test_nobody_works_in_a_stopped_sandbox(inside: ManagerInside, box: str) -> None:
    await order(inside, "stop")
    answer = await inside.client.post(f"{SANDBOXES}/box/run", json={"command": ["true"]})
    assert_error(answer, 409, "not_running")
    assert "atelier start box" in answer.json()["hint"]


@pytest.mark.parametrize(
    ("verb", "body"), [("stop", {"grace_seconds": -1}), ("stop", {"x": 1}), ("resize", {}), ("resize", {"disk_mib": 1})]
)
async def test_bad_orders_are_refused(inside: ManagerInside, box: str, verb: str, body: dict[str, Any]) -> None:
    assert_error(await inside.client.post(f"{SANDBOXES}/box/{verb}", json=body), 422, "invalid_request")
    assert (await get(inside))["state"] == "running"


# -- destroy ------------------------------------------------------------------------------------------------------


async def test_destroy_twice_and_during_a_creation(inside: ManagerInside) -> None:
    inside.guests.faults.hang("wait_ready")
    created = await inside.client.post(SANDBOXES, json={"name": "box"})
    assert (created.status_code, created.json()["state"]) == (202, "creating")
    assert_error(await inside.client.post(SANDBOXES, json={"name": "box"}), 409, "name_taken")
    assert_error(await order(inside, "stop"), 409, "invalid_state")
    inside.storage.faults.hang("ensure_volume_absent")
    for _ in range(2):
        assert (await inside.client.delete(f"{SANDBOXES}/box")).status_code == 202
    assert (await get(inside))["state"] == "destroying"
    assert_error(await order(inside, "start"), 409, "invalid_state")
    inside.storage.faults.release("ensure_volume_absent")
    await until_gone(inside)
    inside.guests.faults.release("wait_ready")
    assert inside.storage.volumes == {}
    await create(inside, name="box")


# -- resize -------------------------------------------------------------------------------------------------------


async def test_resize(inside: ManagerInside, box: str) -> None:
    assert_error(await order(inside, "resize", disk_mib=2048), 422, "disk_cannot_shrink")
    same = await order(inside, "resize", disk_mib=4096)
    assert (same.status_code, same.json()["disk_mib"]) == (200, 4096)
    grown = await order(inside, "resize", disk_mib=8192)
    assert (grown.status_code, grown.json()["disk_mib"], grown.json()["failure"]) == (200, 8192, None)
    await order(inside, "stop")
    assert (await order(inside, "resize", disk_mib=9000)).status_code == 200
    assert inside.storage.sizes_mib[box] == 9000


async def test_a_resize_that_takes_longer_than_the_wait_is_no_end(inside: ManagerInside, box: str) -> None:
    await order(inside, "stop")
    inside.storage.faults.hang("grow_volume")
    path, query = f"{SANDBOXES}/box/resize", {"wait": True, "timeout_seconds": 0.05}
    answer = await inside.client.post(path, params=query, json={"disk_mib": 8192})
    assert (answer.status_code, answer.json()["state"]) == (202, "stopped")
    assert_error(await order(inside, "start"), 409, "sandbox_busy")
    inside.storage.faults.release("grow_volume")
    await inside.settle(box)
    assert inside.storage.sizes_mib[box] == 8192


# -- what is stuck ------------------------------------------------------------------------------------------------


async def test_retry(inside: ManagerInside, box: str) -> None:
    assert_error(await order(inside, "retry"), 409, "nothing_stuck")
    await order(inside, "stop")
    inside.storage.faults.fail_next("grow_volume", HostError("the disk is held", hint="let go of it"), times=1000)
    stuck = await order(inside, "resize", disk_mib=8192)
    assert stuck.status_code == 200, "a person's turn"
    failure = stuck.json()["failure"]
    assert failure["code"] == "resize_stuck"
    assert failure["message"] == "stuck while being resized: the disk is held"
    assert failure["hint"] == "let go of it, then: atelier retry box"
    inside.storage.faults._failures.clear()
    again = await order(inside, "retry")
    assert (again.status_code, again.json()["failure"]) == (200, None)
    assert inside.storage.sizes_mib[box] == 8192


# -- time limits --------------------------------------------------------------------------------------------------


async def test_an_expiry_in_the_past_is_refused(inside: ManagerInside, box: str) -> None:
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    assert_error(await inside.client.post(SANDBOXES, json={"expires_at": past}), 422, "expiry_in_past")
    assert_error(await inside.client.patch(f"{SANDBOXES}/box", json={"expires_at": past}), 422, "expiry_in_past")
    without_zone = {"expires_at": "2100-01-01T00:00:00"}
    assert_error(await inside.client.patch(f"{SANDBOXES}/box", json=without_zone), 422, "invalid_request")
    assert (await get(inside))["expires_at"] is None


async def test_limits_are_changed_one_by_one_and_taken_away(inside: ManagerInside) -> None:
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    await create(inside, name="box", expires_at=soon, auto_stop_after_idle_seconds=60)

    async def patch(**body: Any) -> tuple[bool, int | None]:
        answer = await inside.client.patch(f"{SANDBOXES}/box", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json() == await get(inside)
        return answer.json()["expires_at"] is not None, answer.json()["auto_stop_after_idle_seconds"]

    assert await patch() == (True, 60)
    assert await patch(auto_stop_after_idle_seconds=90) == (True, 90)
    path = f"{SANDBOXES}/box"
    later = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
    await asyncio.gather(
        # While this one writes, the two that come after it have to wait, and know of nothing new.
        inside.installation.fleet._database.write(lambda _: time.sleep(0.5)),
        inside.client.patch(path, json={"expires_at": later}),
        inside.client.patch(path, json={"auto_stop_after_idle_seconds": 70}),
    )
    row = await get(inside)
    assert datetime.fromisoformat(row["expires_at"]) == datetime.fromisoformat(later)
    assert row["auto_stop_after_idle_seconds"] == 70, "both are kept"
    assert await patch(auto_stop_after_idle_seconds=90) == (True, 90)
    assert await patch(expires_at=None) == (False, 90)
    assert await patch(auto_stop_after_idle_seconds=None) == (False, None)
    inside.clock.put_on(7200)
    await inside.enforce_limits()
    assert (await get(inside))["state"] == "running"


async def test_who_has_expired_is_destroyed_in_any_state(inside: ManagerInside) -> None:
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    await create(inside, name="box", expires_at=soon)
    await create(inside, name="stopped", expires_at=soon)
    await create(inside, name="extended", expires_at=soon)
    await inside.client.post(f"{SANDBOXES}/stopped/stop", params=WAIT)
    inside.clock.put_on(3500)
    await inside.enforce_limits()
    assert (await get(inside))["state"] == "running"
    later = (inside.clock() + timedelta(hours=1)).isoformat()
    await inside.client.patch(f"{SANDBOXES}/extended", json={"expires_at": later})
    inside.clock.put_on(200)
    await inside.enforce_limits()
    await until_gone(inside)
    await until_gone(inside, "stopped")
    assert (await get(inside, "extended"))["state"] == "running"
    assert len(inside.storage.volumes) == 1


async def test_who_is_idle_is_stopped_and_a_program_that_somebody_reads_is_use(inside: ManagerInside) -> None:
    for name in ("box", "used", "looked-at"):
        await create(inside, name=name, auto_stop_after_idle_seconds=60)
    path = f"{SANDBOXES}/used/exec"
    reading = asyncio.create_task(inside.client.post(path, json={"command": ["sleep", "600"]}, timeout=None))
    async with asyncio.timeout(20):
        while not (await inside.client.get(f"{SANDBOXES}/used/processes")).json()["items"]:
            await asyncio.sleep(0.01)
    inside.clock.put_on(120)
    for below in ("", "/console", "/metrics"):
        assert (await inside.client.get(f"{SANDBOXES}/looked-at{below}")).status_code == 200
    await inside.enforce_limits()
    for name in ("box", "looked-at"):
        row = await get(inside, name)
        await inside.settle(row["id"])
        row = await get(inside, name)
        assert (row["state"], row["stop_reason"]) == ("stopped", "idle")
    assert (await get(inside, "used"))["state"] == "running"
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await inside.enforce_limits()
    assert (await get(inside, "used"))["state"] == "running", "its time begins with the last use"
    inside.clock.put_on(61)
    await inside.enforce_limits()
    await inside.settle((await get(inside, "used"))["id"])
    assert (await get(inside, "used"))["stop_reason"] == "idle"


@pytest.mark.parametrize("below", ["", "/archive"])
async def test_a_long_transfer_is_use_for_its_whole_length(inside: ManagerInside, below: str) -> None:
    await create(inside, name="box", auto_stop_after_idle_seconds=60)
    go_on = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"\0" * 5120
        await go_on.wait()
        yield b"\0" * 5120

    path = f"{SANDBOXES}/box/files{below}"
    sending = asyncio.create_task(inside.client.put(path, params={"path": "/tmp/x"}, content=slowly()))
    async with asyncio.timeout(60):
        while not inside.installation.lifecycle.activity._busy:
            await asyncio.sleep(0.01)
    inside.clock.put_on(120)
    await inside.enforce_limits()
    assert (await get(inside))["state"] == "running"
    go_on.set()
    assert (await sending).status_code in (200, 204)
    row = await get(inside)
    assert not inside.installation.lifecycle.activity._busy
    for path in (f"{SANDBOXES}/box/files?path=/tmp/{'x' if not below else 'absent'}", f"{SANDBOXES}/box/files?path=no"):
        await inside.client.get(path)
    assert not inside.installation.lifecycle.activity._busy, row


# -- the host -----------------------------------------------------------------------------------------------------


async def test_disks_without_a_sandbox_are_listed_and_removed_on_demand(inside: ManagerInside, box: str) -> None:
    volumes = "/api/v1/host/orphans/volume"
    assert (await inside.client.get("/api/v1/host/orphans")).json() == {"items": []}
    assert_error(await inside.client.delete(f"{volumes}/{box}"), 409, "not_an_orphan")
    await order(inside, "stop")
    database = inside.installation.fleet._database
    await database.write(lambda connection: SandboxRepository().delete(connection, box))
    (orphan,) = (await inside.client.get("/api/v1/host/orphans")).json()["items"]
    assert (orphan["kind"], orphan["id"]) == ("volume", box)
    assert orphan["used_bytes"] > 0
    assert (await inside.client.delete(f"{volumes}/{box}")).status_code == 204
    assert_error(await inside.client.delete(f"{volumes}/{box}"), 404, "orphan_not_found")
    assert inside.storage.volumes == {}


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        ("keep", {"changed": [], "running": ["box", "other"]}),
        ("stop", {"changed": ["box", "other"], "running": []}),
        ("destroy", {"changed": ["box", "other", "resting"], "running": []}),
    ],
)
async def test_shutdown(inside: ManagerInside, what: str, answer: dict[str, Any]) -> None:
    for name in ("box", "other", "resting"):
        await create(inside, name=name)
    await inside.client.post(f"{SANDBOXES}/resting/stop", params=WAIT)
    assert_error(await inside.client.post("/api/v1/host/shutdown", json={"sandboxes": "x"}), 422, "invalid_request")
    assert not inside.installation.end_asked.is_set()
    assert (await inside.client.post("/api/v1/host/shutdown", json={"sandboxes": what})).json() == answer
    assert inside.installation.end_asked.is_set()
