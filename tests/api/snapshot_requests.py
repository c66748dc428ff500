"""Requests about snapshots and forks to a manager inside the test, and what is expected of them unless a test says else."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from .manager_inside import ManagerInside
from .test_sandbox_routes import SANDBOXES

SNAPSHOTS = "/api/v1/snapshots"
WAIT = {"wait": True}


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
        while inside.storage.snapshots or [*inside.installation.data.snapshots.glob("*")]:
            await asyncio.sleep(0.01)
    assert await names(inside) == []


async def write(inside: ManagerInside, sandbox: str, path: str, content: bytes) -> None:
    answer = await inside.client.put(f"{SANDBOXES}/{sandbox}/files", params={"path": path}, content=content)
    assert answer.status_code == 200, answer.text


async def read(inside: ManagerInside, sandbox: str, path: str) -> bytes | None:
    answer = await inside.client.get(f"{SANDBOXES}/{sandbox}/files", params={"path": path})
    return answer.content if answer.status_code == 200 else None
