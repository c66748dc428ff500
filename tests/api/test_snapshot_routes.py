"""Snapshots over the API: what begins from them, what is refused, and that nothing half-made is ever listed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from atelier.db.snapshots import SnapshotRepository
from atelier.model.errors import DiskFullError, HostError
from atelier.model.snapshot import SnapshotPurpose

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
    take,
    until_listed,
    write,
)
from .test_sandbox_routes import SANDBOXES, assert_error


@pytest.fixture
async def box(inside: ManagerInside) -> str:
    """Id of a running sandbox called ``box``."""
    return (await create(inside, name="box", environment={"A": "1", "B": "1"}, labels={"team": "web"}))["id"]


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
    for verb, state in (("pause", "paused"), ("resume", ""), ("stop", "stopped")):
        await inside.client.post(f"{SANDBOXES}/box/{verb}", params=WAIT)
        for answer in (await ask(inside), await fork(inside)) if state else ():
            assert_error(answer, 409, "invalid_state")
            assert f"it is {state}" in answer.json()["message"]
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


@pytest.mark.parametrize("file", ["state", "memory", "disk"])
async def test_one_changed_byte_takes_it_out_of_service_and_its_siblings_serve(
    inside: ManagerInside, box: str, file: str
) -> None:
    damaged, whole = await take(inside, "damaged"), await take(inside, "whole")
    if file == "disk":
        inside.storage.damaged_snapshots.add(damaged["id"])
    else:
        path = inside.installation.data.snapshot(damaged["id"]) / file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.chmod(0o600)
        path.write_bytes(content)
    if file != "state":
        # The large ones are read before the first use after the host was booted.
        inside.vmm.reboot()
    lost = (await inside.client.post(SANDBOXES, params=WAIT, json={"name": "lost", "snapshot": "damaged"})).json()
    code = "disk_file_damaged" if file == "disk" else "snapshot_damaged"
    assert (lost["state"], lost["failure"]["code"]) == ("failed", code)
    assert lost["failure"]["hint"]
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
