"""Pause and resume over the API: what goes on where it stood, what wakes it, and what is told when it cannot be."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from atelier.model.errors import CapacityError, HostError

from .manager_inside import ManagerInside
from .test_sandbox_routes import SANDBOXES, assert_error

WAIT = {"wait": True}


@pytest.fixture
async def box(inside: ManagerInside) -> str:
    """Id of a running sandbox called ``box``."""
    answer = await inside.client.post(SANDBOXES, params=WAIT, json={"name": "box"})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


async def order(inside: ManagerInside, verb: str, *, wait: bool = True, **body: Any) -> httpx.Response:
    return await inside.client.post(f"{SANDBOXES}/box/{verb}", params={"wait": wait}, json=body or None)


async def get(inside: ManagerInside) -> dict[str, Any]:
    return (await inside.client.get(f"{SANDBOXES}/box")).json()


async def run(inside: ManagerInside, *command: str) -> httpx.Response:
    return await inside.client.post(f"{SANDBOXES}/box/run", json={"command": command})


async def test_pause_and_resume(inside: ManagerInside, box: str) -> None:
    reading = asyncio.create_task(
        inside.client.post(f"{SANDBOXES}/box/exec", json={"command": ["sleep", "600"]}, timeout=None)
    )
    async with asyncio.timeout(20):
        while not (found := (await inside.client.get(f"{SANDBOXES}/box/processes")).json()["items"]):
            await asyncio.sleep(0.01)
    await inside.client.put(f"{SANDBOXES}/box/files", params={"path": "/tmp/kept"}, content=b"here")
    paused = await order(inside, "pause")
    assert (paused.status_code, paused.json()["state"], paused.json()["failure"]) == (200, "paused", None)
    assert inside.vmm.running == []
    await asyncio.wait({reading}, timeout=20)
    resumed = await order(inside, "resume")
    assert (resumed.status_code, resumed.json()["id"], resumed.json()["state"]) == (200, box, "running")
    again = (await inside.client.get(f"{SANDBOXES}/box/processes")).json()["items"]
    assert [each["pid"] for each in again] == [each["pid"] for each in found], "it lives, though nobody read it"
    kept = await inside.client.get(f"{SANDBOXES}/box/files", params={"path": "/tmp/kept"})
    assert kept.content == b"here"
    assert inside.vmm.is_link_open(box)
    assert not inside.vmm.is_stopped(box)


async def test_what_runs_is_not_resumed_and_what_is_paused_not_paused_again(inside: ManagerInside, box: str) -> None:
    assert_error(await order(inside, "resume"), 409, "invalid_state")
    await order(inside, "pause")
    for verb in ("pause", "stop", "restart", "start", "retry"):
        assert (await order(inside, verb)).status_code == 409, verb
    assert_error(await order(inside, "resize", disk_mib=8192), 409, "invalid_state")
    await order(inside, "resume")
    await order(inside, "stop")
    for verb in ("pause", "resume"):
        assert_error(await order(inside, verb), 409, "invalid_state")
        assert_error(await inside.client.post(f"{SANDBOXES}/absent/{verb}"), 404, "sandbox_not_found")
    assert_error(await order(inside, "resume", from_disk="perhaps"), 422, "invalid_request")


async def test_two_pauses_at_once_are_one_and_a_resume_meanwhile_is_refused(inside: ManagerInside, box: str) -> None:
    inside.vmm.faults.hang("save")
    answers = await asyncio.gather(order(inside, "pause", wait=False), order(inside, "pause", wait=False))
    assert [(each.status_code, each.json()["state"]) for each in answers] == [(202, "pausing")] * 2
    assert_error(await order(inside, "resume"), 409, "invalid_state")
    assert_error(await run(inside, "true"), 409, "not_running")
    inside.vmm.faults.release("save")
    await inside.settle(box)
    assert (await get(inside))["state"] == "paused"
    inside.vmm.faults.hang("ensure_started")
    both = await asyncio.gather(order(inside, "resume", wait=False), order(inside, "resume", wait=False))
    assert [(each.status_code, each.json()["state"]) for each in both] == [(202, "resuming")] * 2
    assert_error(await order(inside, "pause"), 409, "invalid_state")
    inside.vmm.faults.release("ensure_started")
    await inside.settle(box)
    assert (await get(inside))["state"] == "running"


async def test_a_pause_that_fails_leaves_it_running_and_is_told(inside: ManagerInside, box: str) -> None:
    await inside.client.put(f"{SANDBOXES}/box/files", params={"path": "/tmp/kept"}, content=b"here")
    inside.vmm.faults.fail_next("save", HostError("no space left", code="disk_full", hint="make room"))
    failed = await order(inside, "pause")
    assert (failed.status_code, failed.json()["state"]) == (200, "running")
    assert failed.json()["failure"] == {"code": "disk_full", "message": "no space left", "hint": "make room"}
    assert (await run(inside, "true")).json()["exit_code"] == 0, "nothing of it stands still"
    assert (await order(inside, "pause")).json()["state"] == "paused"
    assert (await get(inside))["failure"] is None


async def test_a_resume_that_fails_leaves_it_paused_and_can_be_tried_again(inside: ManagerInside, box: str) -> None:
    await inside.client.put(f"{SANDBOXES}/box/files", params={"path": "/tmp/kept"}, content=b"here")
    await order(inside, "pause")
    inside.vmm.faults.fail_next("ensure_started")
    failed = await order(inside, "resume")
    assert (failed.status_code, failed.json()["state"]) == (200, "paused")
    assert failed.json()["failure"]["code"] == "injected_fault"
    assert (await order(inside, "resume")).json()["state"] == "running"
    kept = await inside.client.get(f"{SANDBOXES}/box/files", params={"path": "/tmp/kept"})
    assert kept.content == b"here"


async def test_a_damaged_memory_is_refused_and_the_disk_boots(inside: ManagerInside, box: str) -> None:
    await order(inside, "pause")
    (memory,) = inside.installation.data.paused.glob("*.memory")
    memory.chmod(0o600)
    content = bytearray(memory.read_bytes())
    content[len(content) // 2] ^= 1
    memory.write_bytes(content)
    inside.vmm.reboot()
    refused = (await order(inside, "resume")).json()
    assert (refused["state"], refused["failure"]["code"]) == ("paused", "saved_memory_damaged")
    assert "--from-disk" in refused["failure"]["hint"]
    booted = await order(inside, "resume", from_disk=True)
    assert (booted.status_code, booted.json()["state"], booted.json()["failure"]) == (200, "running", None)
    assert not list(inside.installation.data.paused.glob("*.memory")), "it would fit its disk no more"


async def test_whoever_uses_it_wakes_it_and_whoever_looks_does_not(inside: ManagerInside, box: str) -> None:
    await order(inside, "pause")
    for below in ("", "/console"):
        assert (await inside.client.get(f"{SANDBOXES}/box{below}")).status_code == 200
    assert_error(await inside.client.get(f"{SANDBOXES}/box/metrics"), 409, "not_running")
    assert (await get(inside))["state"] == "paused"
    answers = await asyncio.gather(*(run(inside, "true") for _ in range(5)))
    assert [answer.json().get("exit_code") for answer in answers] == [0] * 5
    assert (await get(inside))["state"] == "running"
    await order(inside, "pause")
    listed = await inside.client.get(f"{SANDBOXES}/box/files/list", params={"path": "/"})
    assert listed.status_code == 200, listed.text


async def test_one_that_cannot_be_woken_says_why(
    inside: ManagerInside, box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await order(inside, "pause")
    inside.vmm.faults.fail_next("ensure_started")
    refused = await run(inside, "true")
    assert_error(refused, 409, "not_running")
    assert "ensure_started failed" in refused.json()["message"]
    assert "atelier resume" in refused.json()["hint"]

    async def full(self: object, *arguments: object, **options: object) -> None:
        raise CapacityError("this host has no room for it")

    monkeypatch.setattr(type(inside.installation.lifecycle), "resume", full)
    assert_error(await run(inside, "true"), 503, "insufficient_capacity")


async def test_destroy_wins_over_a_pause_and_a_resume(inside: ManagerInside, box: str) -> None:
    inside.vmm.faults.hang("save")
    await order(inside, "pause", wait=False)
    assert (await inside.client.delete(f"{SANDBOXES}/box", params=WAIT)).status_code == 204
    inside.vmm.faults.release("save")
    answer = await inside.client.post(SANDBOXES, params=WAIT, json={"name": "box"})
    assert answer.json()["state"] == "running"
    await order(inside, "pause")
    inside.vmm.faults.hang("ensure_started")
    await order(inside, "resume", wait=False)
    assert (await inside.client.delete(f"{SANDBOXES}/box", params=WAIT)).status_code == 204
    inside.vmm.faults.release("ensure_started")
    assert (inside.vmm.running, inside.storage.volumes) == ([], {})
    assert not list(inside.installation.data.paused.iterdir())


async def test_a_paused_one_is_destroyed_with_its_memory(inside: ManagerInside, box: str) -> None:
    await order(inside, "pause")
    assert list(inside.installation.data.paused.glob("*.memory"))
    assert (await inside.client.delete(f"{SANDBOXES}/box", params=WAIT)).status_code == 204
    assert not list(inside.installation.data.paused.iterdir())
