"""Snapshots and forks over the API: what begins from them, what is refused, and that nothing half-made is ever listed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from atelier.db.snapshots import SnapshotRepository
from atelier.lifecycle.admission import RoomPolicy
from atelier.model.errors import DiskFullError, HostError
from atelier.model.snapshot import SnapshotPurpose

from .manager_inside import ManagerInside, open_manager_inside
from .test_sandbox_routes import SANDBOXES, assert_error

SNAPSHOTS = "/api/v1/snapshots"
WAIT = {"wait": True}


@pytest.fixture
async def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ManagerInside]:
    async with open_manager_inside(tmp_path, monkeypatch) as opened:
        yield opened


@pytest.fixture
async def box(inside: ManagerInside) -> str:
    """Id of a running sandbox called ``box``."""
    return (await create(inside, name="box", environment={"A": "1", "B": "1"}, labels={"team": "web"}))["id"]


async def create(inside: ManagerInside, **body: Any) -> dict[str, Any]:
    answer = await inside.client.post(SANDBOXES, params=WAIT, json=body)
    assert answer.status_code == 201, answer.text
    assert answer.json()["state"] == "running", answer.text
    return answer.json()


async def take(inside: ManagerInside, name: str | None = None, *, of: str = "box", **body: Any) -> dict[str, Any]:
    answer = await ask(inside, of=of, **({"name": name} if name else {}), **body)
    assert answer.status_code == 201, answer.text
    assert answer.json()["state"] == "ready", answer.text
    return answer.json()


async def ask(inside: ManagerInside, *, of: str = "box", wait: bool = True, **body: Any) -> httpx.Response:
    return await inside.client.post(f"{SANDBOXES}/{of}/snapshots", params={"wait": wait}, json=body or None)


async def fork(inside: ManagerInside, *, of: str = "box", wait: bool = True, **body: Any) -> httpx.Response:
    return await inside.client.post(f"{SANDBOXES}/{of}/fork", params={"wait": wait}, json=body or None)


async def names(inside: ManagerInside, **query: Any) -> list[str]:
    return [each["name"] for each in (await inside.client.get(SNAPSHOTS, params=query)).json()["items"]]


async def destroy(inside: ManagerInside, name: str) -> None:
    assert (await inside.client.delete(f"{SANDBOXES}/{name}", params=WAIT)).status_code == 204


async def until_listed(inside: ManagerInside, *expected: str) -> None:
    async with asyncio.timeout(20):
        while await names(inside) != list(expected):
            await asyncio.sleep(0.01)


async def until_nothing_is_kept(inside: ManagerInside) -> None:
    async with asyncio.timeout(20):
        while inside.storage.snapshots or list(inside.installation.data.snapshots.iterdir()):
            await asyncio.sleep(0.01)
    assert await names(inside) == []


async def write(inside: ManagerInside, sandbox: str, path: str, content: bytes) -> None:
    answer = await inside.client.put(f"{SANDBOXES}/{sandbox}/files", params={"path": path}, content=content)
    assert answer.status_code == 200, answer.text


async def read(inside: ManagerInside, sandbox: str, path: str) -> bytes | None:
    answer = await inside.client.get(f"{SANDBOXES}/{sandbox}/files", params={"path": path})
    return answer.content if answer.status_code == 200 else None


# -- taking -------------------------------------------------------------------------------------------------------


async def test_take_get_list_delete(inside: ManagerInside, box: str) -> None:
    taken = await take(inside, "ready", labels={"job": "7"})
    assert (taken["sandbox_id"], taken["sandbox_name"], taken["purpose"]) == (box, "box", "user")
    assert (taken["vcpu_count"], taken["memory_mib"], taken["disk_mib"], taken["labels"]) == (
        1,
        512,
        4096,
        {"job": "7"},
    )
    assert taken["memory_bytes"] > 0
    assert taken["disk_bytes"] > 0
    assert (await inside.client.get(f"{SANDBOXES}/box")).json()["state"] == "running"
    for reference in ("ready", taken["id"]):
        assert (await inside.client.get(f"{SNAPSHOTS}/{reference}")).json() == taken
    other = await take(inside)
    assert other["name"].startswith("box-")
    assert other["parent_id"] == taken["id"]
    assert await names(inside) == ["ready", other["name"]]
    assert await names(inside, label="job=7") == ["ready"]
    assert await names(inside, sandbox=box) == await names(inside, sandbox="box") == ["ready", other["name"]]
    assert await names(inside, sandbox="absent") == []
    assert_error(await inside.client.get(SNAPSHOTS, params={"label": "job"}), 422, "invalid_request")
    assert (await inside.client.delete(f"{SNAPSHOTS}/ready")).status_code == 204, "the second stands over the image"
    assert_error(await inside.client.delete(f"{SNAPSHOTS}/ready"), 404, "snapshot_not_found")
    assert (await inside.client.get(f"{SNAPSHOTS}/{other['id']}")).json()["parent_id"] is None
    assert await names(inside) == [other["name"]]


async def test_what_is_half_made_is_in_no_list(inside: ManagerInside, box: str) -> None:
    inside.vmm.faults.hang("save")
    begun = await ask(inside, name="ready", wait=False)
    assert (begun.status_code, begun.json()["state"]) == (202, "taking")
    assert_error(await inside.client.delete(f"{SNAPSHOTS}/ready"), 409, "snapshot_busy")
    assert_error(await ask(inside, name="other"), 409, "sandbox_busy")
    assert_error(await inside.client.post(f"{SANDBOXES}/box/pause"), 409, "sandbox_busy")
    inside.vmm.faults.hang("bake")
    inside.vmm.faults.release("save")
    async with asyncio.timeout(20):
        while (await inside.client.get(f"{SNAPSHOTS}/ready")).json()["state"] != "baking":
            await asyncio.sleep(0.01)
    assert await names(inside) == []
    assert_error(await inside.client.post(SANDBOXES, json={"snapshot": "ready"}), 409, "snapshot_not_ready")
    short = {"wait": True, "timeout_seconds": 0.05}
    assert (await inside.client.post(f"{SANDBOXES}/box/snapshots", params=short)).status_code == 202
    inside.vmm.faults.release("bake")
    async with asyncio.timeout(20):
        while "ready" not in await names(inside):
            await asyncio.sleep(0.01)


async def test_one_that_fails_says_why_and_its_name_is_free(inside: ManagerInside, box: str) -> None:
    await write(inside, "box", "/tmp/kept", b"here")
    for operation in ("save", "bake"):
        inside.vmm.faults.fail_next(operation, DiskFullError("no space left", hint="make room"), times=10)
        failed = await ask(inside, name="ready")
        assert (failed.status_code, failed.json()["state"]) == (201, "failed")
        assert failed.json()["failure"] == {"code": "disk_full", "message": "no space left", "hint": "make room"}
        inside.vmm.faults._failures.clear()
        assert await names(inside) == []
        row = (await inside.client.get(f"{SANDBOXES}/box")).json()
        assert (row["state"], row["failure"]) == ("running", None)
        assert await read(inside, "box", "/tmp/kept") == b"here"
        assert_error(await inside.client.post(SANDBOXES, json={"snapshot": "ready"}), 409, "snapshot_not_ready")
    assert inside.storage.snapshots == {}
    assert not list(inside.installation.data.snapshots.iterdir())
    await take(inside, "ready")
    assert (await inside.client.delete(f"{SNAPSHOTS}/ready")).status_code == 204


async def test_bad_wishes(inside: ManagerInside, box: str) -> None:
    await take(inside, "ready")
    assert_error(await ask(inside, name="ready"), 409, "name_taken")
    for name in ("", "No", "a" * 41, "abcdefghijkl"):
        assert_error(await ask(inside, name=name), 422, "invalid_name")
    for body in ({"keep_last": 0}, {"keep_last": -1}, {"labels": {"": "x"}}, {"x": 1}):
        assert_error(await ask(inside, **body), 422, "invalid_request")
    assert_error(await ask(inside, of="absent"), 404, "sandbox_not_found")
    for reference in ("absent", "abcdefghijkl"):
        assert_error(await inside.client.get(f"{SNAPSHOTS}/{reference}"), 404, "snapshot_not_found")
        assert_error(await inside.client.post(SANDBOXES, json={"snapshot": reference}), 404, "snapshot_not_found")
    assert_error(await inside.client.post(SANDBOXES, json={"disk_only": True}), 422, "invalid_request")
    await inside.client.post(f"{SANDBOXES}/box/stop", params=WAIT)
    for answer in (await ask(inside), await fork(inside)):
        assert_error(answer, 409, "invalid_state")
        assert "start or resume it" in answer.json()["hint"]
    inside.guests.faults.fail_next("wait_ready", DiskFullError("no space left"), times=100)
    failed = await inside.client.post(SANDBOXES, params=WAIT, json={"name": "failed"})
    assert failed.json()["state"] == "failed"
    inside.guests.faults._failures.clear()
    for answer in (await ask(inside, of="failed"), await fork(inside, of="failed")):
        assert_error(answer, 409, "invalid_state")
    assert await names(inside) == ["ready"]


async def test_destroy_wins_and_a_snapshot_outlives_its_sandbox(inside: ManagerInside, box: str) -> None:
    inside.vmm.faults.hang("save")
    await ask(inside, name="lost", wait=False)
    await destroy(inside, "box")
    inside.vmm.faults.release("save")
    lost = (await inside.client.get(f"{SNAPSHOTS}/lost")).json()
    assert (lost["state"], lost["failure"]["code"]) == ("failed", "sandbox_destroyed")
    await create(inside, name="box")
    inside.vmm.faults.hang("bake")
    await ask(inside, name="kept", wait=False)
    async with asyncio.timeout(20):
        while (await inside.client.get(f"{SNAPSHOTS}/kept")).json()["state"] != "baking":
            await asyncio.sleep(0.01)
    await destroy(inside, "box")
    inside.vmm.faults.release("bake")
    await until_listed(inside, "kept")
    assert (await create(inside, snapshot="kept", name="box"))["state"] == "running"


async def test_only_so_many_are_kept_and_what_is_needed_stays(inside: ManagerInside, box: str) -> None:
    await take(inside, "one")
    await take(inside, "two")
    await create(inside, name="needs-one", snapshot="one")
    await take(inside, "elsewhere", of="needs-one")
    await take(inside, "three", keep_last=2)
    await until_listed(inside, "one", "two", "elsewhere", "three")
    await take(inside, "four", keep_last=2)
    await until_listed(inside, "one", "elsewhere", "three", "four")
    await destroy(inside, "needs-one")
    await until_listed(inside, "one", "elsewhere", "three", "four")
    assert (await inside.client.delete(f"{SNAPSHOTS}/elsewhere")).status_code == 204
    await inside.installation.lifecycle.snapshots.drop_unneeded()
    assert await names(inside) == ["three", "four"]


async def test_one_that_is_half_deleted_serves_nobody(inside: ManagerInside, box: str) -> None:
    await take(inside, "ready")
    inside.storage.faults.hang("ensure_snapshot_disk_absent")
    deleting = asyncio.create_task(inside.client.delete(f"{SNAPSHOTS}/ready"))
    async with asyncio.timeout(20):
        while (await inside.client.get(f"{SNAPSHOTS}/ready")).json()["state"] != "deleting":
            await asyncio.sleep(0.01)
    assert await names(inside) == []
    assert_error(await inside.client.post(SANDBOXES, json={"snapshot": "ready"}), 409, "snapshot_not_ready")
    assert_error(await ask(inside, name="ready"), 409, "name_taken")
    inside.storage.faults.release("ensure_snapshot_disk_absent")
    assert (await deleting).status_code == 204
    inside.storage.faults.fail_next("ensure_snapshot_disk_absent", HostError("held", hint="let go of it"), times=1000)
    await take(inside, "ready")
    stuck = await inside.client.delete(f"{SNAPSHOTS}/ready")
    assert_error(stuck, 500, "delete_stuck")
    assert "let go of it" in stuck.json()["hint"]
    row = (await inside.client.get(f"{SNAPSHOTS}/ready")).json()
    assert (row["state"], row["failure"]["message"]) == ("deleting", "held")
    inside.storage.faults._failures.clear()
    assert (await inside.client.delete(f"{SNAPSHOTS}/ready")).status_code == 204
    assert_error(await inside.client.get(f"{SNAPSHOTS}/ready"), 404, "snapshot_not_found")


# -- sandboxes from snapshots -------------------------------------------------------------------------------------


async def test_create_from_a_snapshot(inside: ManagerInside, box: str) -> None:
    await write(inside, "box", "/tmp/before", b"1")
    taken = await take(inside, "ready")
    await write(inside, "box", "/tmp/after", b"2")
    made = await create(inside, name="other", snapshot="ready", disk_mib=8192, environment={"B": "2"})
    assert (made["snapshot_id"], made["disk_mib"], made["image_id"]) == (taken["id"], 8192, taken["image_id"])
    assert (made["labels"], (await inside.client.get(f"{SANDBOXES}/box")).json()["snapshot_id"]) == ({}, None)
    assert await read(inside, "other", "/tmp/before") == b"1"
    assert await read(inside, "other", "/tmp/after") is None
    identity = inside.guests.identity(made["id"])
    assert identity is not None
    assert (identity.environment, identity.hostname, identity.restored) == ({"A": "1", "B": "2"}, "other", True)
    assert inside.vmm.is_link_open(made["id"])
    below = await take(inside, "below", of="other")
    assert below["parent_id"] == taken["id"]
    await destroy(inside, "other")
    refused = await inside.client.delete(f"{SNAPSHOTS}/ready")
    assert_error(refused, 409, "snapshot_in_use")
    assert "snapshot below" in refused.json()["message"]
    assert (await inside.client.delete(f"{SNAPSHOTS}/below")).status_code == 204
    assert (await inside.client.delete(f"{SNAPSHOTS}/ready")).status_code == 204


async def test_sizes_come_from_the_snapshot(inside: ManagerInside, box: str) -> None:
    await create(inside, name="large", vcpu_count=2, memory_mib=1024, disk_mib=8192)
    await take(inside, "large", of="large")
    made = await create(inside, snapshot="large")
    assert (made["vcpu_count"], made["memory_mib"], made["disk_mib"]) == (2, 1024, 8192)
    same = await create(inside, snapshot="large", vcpu_count=2, memory_mib=1024, disk_mib=8192, image="base")
    assert same["state"] == "running"
    for body in ({"vcpu_count": 1}, {"memory_mib": 512}, {"image": "other"}):
        answer = await inside.client.post(SANDBOXES, json={"snapshot": "large", **body})
        assert_error(answer, 422, "fixed_by_snapshot")
        assert next(iter(body)) in answer.json()["message"]
    small = {"snapshot": "large", "disk_mib": 4096}
    assert_error(await inside.client.post(SANDBOXES, json=small), 422, "disk_cannot_shrink")
    assert_error(await inside.client.post(SANDBOXES, json={**small, "disk_only": True}), 422, "disk_cannot_shrink")
    wrong = {"snapshot": "large", "image": "other", "disk_only": True}
    assert_error(await inside.client.post(SANDBOXES, json=wrong), 422, "fixed_by_snapshot")


async def test_one_that_does_not_fit_is_refused_and_its_disk_boots(inside: ManagerInside, box: str) -> None:
    taken = await take(inside, "ready")
    stamp = type(inside.vmm).stamp

    async def upgraded(*arguments: Any) -> Any:
        return replace(await stamp(*arguments), vmm_version="2.0.0")

    type(inside.vmm).stamp = upgraded  # type: ignore[method-assign]
    try:
        refused = await inside.client.post(SANDBOXES, json={"snapshot": "ready"})
        assert_error(refused, 409, "snapshot_incompatible")
        assert "vmm_version" in refused.json()["message"]
        assert "--snapshot ready --disk-only" in refused.json()["hint"]
        booted = await create(inside, snapshot="ready", disk_only=True, memory_mib=1024, disk_mib=8192)
    finally:
        type(inside.vmm).stamp = stamp  # type: ignore[method-assign]
    assert (booted["snapshot_id"], booted["memory_mib"], booted["disk_mib"]) == (taken["id"], 1024, 8192)
    console = await inside.client.get(f"{SANDBOXES}/{booted['id']}/console")
    assert b"started" in console.content
    assert b"restored" not in console.content
    assert_error(await inside.client.delete(f"{SNAPSHOTS}/ready"), 409, "snapshot_in_use")


async def test_a_damaged_one_is_taken_out_of_service_and_its_siblings_serve(inside: ManagerInside, box: str) -> None:
    damaged, whole = await take(inside, "damaged"), await take(inside, "whole")
    state = inside.installation.data.snapshots / damaged["id"] / "state"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.chmod(0o600)
    state.write_bytes(content)
    made = await inside.client.post(SANDBOXES, params=WAIT, json={"name": "lost", "snapshot": "damaged"})
    assert (made.json()["state"], made.json()["failure"]["code"]) == ("failed", "snapshot_damaged")
    listed = {each["name"]: each for each in (await inside.client.get(SNAPSHOTS)).json()["items"]}
    assert {name: each["state"] for name, each in listed.items()} == {"damaged": "damaged", "whole": "ready"}
    assert listed["damaged"]["failure"]["code"] == "snapshot_damaged"
    assert_error(await inside.client.post(SANDBOXES, json={"snapshot": "damaged"}), 409, "snapshot_not_ready")
    assert (await create(inside, snapshot="whole"))["snapshot_id"] == whole["id"]
    assert (await inside.client.delete(f"{SNAPSHOTS}/damaged")).status_code == 204


async def test_templates_are_nobodys(inside: ManagerInside, box: str) -> None:
    taken = await take(inside, "ready")
    repository = SnapshotRepository()

    def hide(connection: Any) -> None:
        row = repository.get(connection, taken["id"])
        repository.delete(connection, row.id)
        repository.insert(connection, replace(row, purpose=SnapshotPurpose.TEMPLATE, template_key="k"))

    await inside.installation.fleet._database.write(hide)
    assert await names(inside) == []
    assert_error(await inside.client.get(f"{SNAPSHOTS}/ready"), 404, "snapshot_not_found")
    assert_error(await inside.client.delete(f"{SNAPSHOTS}/{taken['id']}"), 404, "snapshot_not_found")
    assert_error(await inside.client.post(SANDBOXES, json={"snapshot": "ready"}), 404, "snapshot_not_found")


# -- forks --------------------------------------------------------------------------------------------------------


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


# -- events -------------------------------------------------------------------------------------------------------


async def test_events_tell_of_each_state(inside: ManagerInside, box: str) -> None:
    taken = await take(inside, "ready")
    await inside.client.delete(f"{SNAPSHOTS}/ready")
    seen: list[tuple[str, str | None]] = []
    async with asyncio.timeout(20):
        async for event in inside.events.follow(0):
            if event.kind.startswith("snapshot."):
                assert (event.sandbox_id, event.payload["id"], event.payload["name"]) == (box, taken["id"], "ready")
                seen.append((event.kind, str(event.payload.get("state", ""))))
            if event.kind == "snapshot.deleted":
                break
    changed = "snapshot.state_changed"
    assert seen == [
        *((changed, state) for state in ("taking", "baking", "ready", "deleting")),
        ("snapshot.deleted", ""),
    ]
