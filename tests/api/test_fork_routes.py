"""Forks over the API: what they are like, what is refused, and that nothing is left of those that fail."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from atelier.lifecycle.admission import RoomPolicy
from atelier.model.errors import DiskFullError

from .manager_inside import ManagerInside
from .snapshot_requests import (
    SNAPSHOTS,
    WAIT,
    ask,
    create,
    destroy,
    fork,
    names,
    read,
    until_listed,
    until_nothing_is_kept,
    write,
)
from .test_sandbox_routes import SANDBOXES, assert_error


@pytest.fixture
async def box(inside: ManagerInside) -> str:
    """Id of a running sandbox called ``box``."""
    return (await create(inside, name="box", environment={"A": "1", "B": "1"}, labels={"team": "web"}))["id"]


async def test_forks_are_like_their_parent_and_of_their_own(inside: ManagerInside, box: str) -> None:
    closed = {"egress": {"mode": "none"}}
    assert (await inside.client.put(f"{SANDBOXES}/box/network", json=closed)).status_code == 200
    await inside.client.patch(f"{SANDBOXES}/box", json={"auto_stop_after_idle_seconds": 900})
    await write(inside, "box", "/tmp/before", b"1")
    answer = await fork(inside, count=3, labels={"job": "7"})
    assert answer.status_code == 201, answer.text
    forks = answer.json()["items"]
    assert [each["name"] for each in forks] == ["box-1", "box-2", "box-3"]
    assert {each["state"] for each in forks} == {"running"}
    assert {(each["memory_mib"], each["disk_mib"], each["auto_stop_after_idle_seconds"]) for each in forks} == {
        (512, 4096, 900)
    }
    assert [each["labels"] for each in forks] == [{"team": "web", "job": "7"}] * 3
    (snapshot_id,) = {each["snapshot_id"] for each in forks}
    (snapshot,) = (await inside.client.get(SNAPSHOTS)).json()["items"]
    assert (snapshot["id"], snapshot["purpose"], snapshot["state"]) == (snapshot_id, "fork", "ready")
    identities = [identity for each in forks if (identity := inside.guests.identity(each["id"])) is not None]
    for field in ("hostname", "machine_id", "token", "generation"):
        assert len({getattr(each, field) for each in identities}) == 3, field
    assert all(each.restored for each in identities)
    for each in forks:
        network = (await inside.client.get(f"{SANDBOXES}/{each['id']}/network")).json()
        assert network["policy"]["egress"]["mode"] == "none"
        assert await read(inside, each["id"], "/tmp/before") == b"1"
        assert inside.vmm.is_link_open(each["id"])
    await write(inside, "box-1", "/tmp/mine", b"2")
    assert await read(inside, "box-2", "/tmp/mine") is None
    assert await read(inside, "box", "/tmp/mine") is None


async def test_a_snapshot_for_forks_goes_with_the_last_of_them(inside: ManagerInside, box: str) -> None:
    assert (await fork(inside, count=2)).status_code == 201
    again = await fork(inside, name_prefix="worker")
    assert [each["name"] for each in again.json()["items"]] == ["worker-1"]
    more = await fork(inside)
    assert [each["name"] for each in more.json()["items"]] == ["box-3"], "numbers that are taken are passed over"
    assert len(await names(inside)) == 3
    first = await names(inside)
    await inside.client.delete(f"{SANDBOXES}/worker-1", params=WAIT)
    await until_listed(inside, first[0], first[2])
    await destroy(inside, "box-1")
    await inside.installation.lifecycle.snapshots.drop_unneeded()
    assert await names(inside) == [first[0], first[2]], "box-2 needs it"
    assert_error(await inside.client.delete(f"{SNAPSHOTS}/{first[0]}"), 409, "snapshot_in_use")
    assert (await inside.client.delete(f"{SANDBOXES}/box-2")).status_code == 202
    await until_listed(inside, first[2])
    await destroy(inside, "box-3")
    await until_nothing_is_kept(inside)


async def test_forks_are_told_before_they_run(inside: ManagerInside, box: str) -> None:
    inside.guests.faults.hang("wait_ready")
    answer = await fork(inside, count=2, wait=False)
    assert (answer.status_code, [each["state"] for each in answer.json()["items"]]) == (202, ["creating"] * 2)
    await inside.installation.lifecycle.snapshots.drop_unneeded()
    inside.guests.faults.release("wait_ready")
    for each in answer.json()["items"]:
        await inside.settle(each["id"])
        assert (await inside.client.get(f"{SANDBOXES}/{each['id']}")).json()["state"] == "running"


@pytest.mark.parametrize("body", [{"count": 0}, {"count": -1}, {"count": "many"}, {"count": 10_001}, {"x": 1}])
async def test_bad_counts_are_refused(inside: ManagerInside, box: str, body: dict[str, Any]) -> None:
    assert_error(await fork(inside, **body), 422, "invalid_request")


async def test_bad_forks_change_nothing(inside: ManagerInside, box: str) -> None:
    assert_error(await fork(inside, of="absent"), 404, "sandbox_not_found")
    for prefix in ("No", "a" * 39, "-x"):
        assert_error(await fork(inside, name_prefix=prefix, count=2), 422, "invalid_name")
    too_many = await fork(inside, count=5000)
    assert_error(too_many, 503, "insufficient_capacity")
    assert "1952 of the 5000 would fit" in too_many.json()["message"]
    inside.vmm.faults.hang("save")
    await ask(inside, name="first", wait=False)
    assert_error(await fork(inside), 409, "sandbox_busy")
    inside.vmm.faults.release("save")
    await until_listed(inside, "first")
    assert len((await inside.client.get(SANDBOXES)).json()["items"]) == 1


async def test_a_fork_whose_snapshot_fails_or_lasts_too_long_leaves_nothing(inside: ManagerInside, box: str) -> None:
    inside.vmm.faults.fail_next("save", DiskFullError("no space left", hint="make room"), times=10)
    assert_error(await fork(inside, count=2), 507, "disk_full")
    inside.vmm.faults._failures.clear()
    inside.vmm.faults.hang("bake")
    short = {"wait": True, "timeout_seconds": 0.2}
    assert_error(await inside.client.post(f"{SANDBOXES}/box/fork", params=short), 504, "timeout")
    inside.vmm.faults.release("bake")
    await until_nothing_is_kept(inside)
    items = (await inside.client.get(SANDBOXES)).json()["items"]
    assert [(each["name"], each["state"]) for each in items] == [("box", "running")]


async def test_room_that_goes_while_it_is_saved(inside: ManagerInside, box: str) -> None:
    lifecycle = inside.installation.lifecycle
    inside.vmm.faults.hang("bake")
    forking = asyncio.create_task(fork(inside, count=2))
    async with asyncio.timeout(20):
        while not inside.storage.snapshots:
            await asyncio.sleep(0.01)
    room = lifecycle._room
    room._policy = RoomPolicy(fixed=replace(room._policy.fixed, memory_mib=1024))
    inside.vmm.faults.release("bake")
    refused = await forking
    assert_error(refused, 503, "insufficient_capacity")
    assert "1 of the 2 would fit" in refused.json()["message"]
    await until_nothing_is_kept(inside)


@pytest.mark.parametrize(("operation", "state"), [("save", "taking"), ("bake", "baking")])
async def test_its_parent_is_destroyed_meanwhile(inside: ManagerInside, box: str, operation: str, state: str) -> None:
    """That wins over saving it, which ends the forking; once it is saved, its forks do without it."""
    inside.vmm.faults.hang(operation)
    forking = asyncio.create_task(fork(inside, count=2))
    async with asyncio.timeout(20):
        async for event in inside.events.follow(0):
            if event.kind == "snapshot.state_changed" and event.payload["state"] == state:
                break
    await destroy(inside, "box")
    inside.vmm.faults.release(operation)
    answer = await forking
    if operation == "save":
        assert_error(answer, 409, "sandbox_destroyed")
        assert "goes on" not in answer.json()["hint"]
        assert (await inside.client.get(SANDBOXES)).json()["items"] == []
    else:
        assert [each["state"] for each in answer.json()["items"]] == ["running"] * 2
        for each in answer.json()["items"]:
            await destroy(inside, each["id"])
    await until_nothing_is_kept(inside)
    assert (inside.vmm.running, inside.storage.volumes) == ([], {})


async def test_forks_are_destroyed_while_they_begin(inside: ManagerInside, box: str) -> None:
    inside.guests.faults.hang("wait_ready")
    first, second = (await fork(inside, count=2, wait=False)).json()["items"]
    await destroy(inside, first["id"])
    inside.guests.faults.release("wait_ready")
    await inside.settle(second["id"])
    assert (await inside.client.get(f"{SANDBOXES}/{second['id']}")).json()["state"] == "running"
    await destroy(inside, second["id"])
    await until_nothing_is_kept(inside)
    assert inside.vmm.running == [box]
