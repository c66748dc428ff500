"""Warm pools over the API, through the SDK and the command line, in mock mode."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.running_manager import RunningManager

from atelier import AsyncWarmPool, Sandbox, WarmPool
from atelier.client.connection import AsyncConnection, Connection
from atelier.client.environment import Endpoint
from atelier.model.errors import InvalidRequestError, NotFoundError
from atelier.schemas.warm_pools import WarmPool as WarmPoolDetails

from .cli_program import Cli
from .manager_inside import ManagerInside
from .test_sandbox_routes import SANDBOXES, assert_error

POOLS = "/api/v1/warm-pools"


@pytest.fixture
def connection(manager: RunningManager, api: httpx.Client) -> Iterator[Connection]:
    with Connection(Endpoint(manager.url, manager.key)) as opened:
        yield opened
        for image in {each.image for each in WarmPool.list(connection=opened)}:
            WarmPool.drain(image, connection=opened)


async def pools(inside: ManagerInside) -> list[dict[str, Any]]:
    return (await inside.client.get(POOLS)).json()["items"]


async def put(inside: ManagerInside, image: str = "base", **body: Any) -> httpx.Response:
    return await inside.client.put(f"{POOLS}/{image}", json=body)


async def until_ready(inside: ManagerInside) -> None:
    async with asyncio.timeout(20):
        while any(each["ready"] < each["size"] for each in await pools(inside)):
            await asyncio.sleep(0.01)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- routes --------------------------------------------------------------------------------------------------------


async def test_set_list_take_drain(inside: ManagerInside) -> None:
    assert await pools(inside) == []
    answer = await put(inside, size=2)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert (said["image"], said["vcpu_count"], said["memory_mib"], said["size"]) == ("base", 1, 512, 2)
    assert said["ready"] + said["coming"] == 2
    await until_ready(inside)
    waiting = set(inside.vmm.running)
    assert (await inside.client.get(SANDBOXES)).json()["items"] == []
    made = await inside.client.post(SANDBOXES, params={"wait": True}, json={"name": "box", "environment": {"A": "1"}})
    assert made.status_code == 201, made.text
    assert made.json()["state"] == "running"
    assert made.json()["id"] in waiting
    await until_ready(inside)
    assert (await inside.client.delete(f"{POOLS}/base")).status_code == 204
    assert await pools(inside) == []
    assert inside.vmm.running == [made.json()["id"]], "what was taken stays"


async def test_pools_by_sizes(inside: ManagerInside) -> None:
    await put(inside, size=1)
    await put(inside, size=1, vcpu_count=2, memory_mib=1024)
    await until_ready(inside)
    assert [(each["vcpu_count"], each["memory_mib"]) for each in await pools(inside)] == [(1, 512), (2, 1024)]
    waiting = set(inside.vmm.running)
    asked = {"name": "box", "vcpu_count": 2, "memory_mib": 1024}
    made = (await inside.client.post(SANDBOXES, params={"wait": True}, json=asked)).json()
    assert made["id"] in waiting
    assert (made["vcpu_count"], made["memory_mib"]) == (2, 1024)
    drained = (await put(inside, size=0, vcpu_count=2, memory_mib=1024)).json()
    assert (drained["size"], drained["ready"], drained["coming"]) == (0, 0, 0)
    assert [each["vcpu_count"] for each in await pools(inside)] == [1]


@pytest.mark.parametrize(
    "body", [{}, {"size": -1}, {"size": 257}, {"size": 1, "vcpu_count": 0}, {"size": 1, "memory_mib": 1}, {"sise": 1}]
)
async def test_what_is_wrong_is_named(inside: ManagerInside, body: dict[str, int]) -> None:
    assert_error(await put(inside, **body), 422, "invalid_request")
    assert await pools(inside) == []


async def test_what_does_not_exist(inside: ManagerInside) -> None:
    assert_error(await put(inside, "absent", size=1), 404, "image_not_found")
    assert_error(await inside.client.delete(f"{POOLS}/base"), 404, "warm_pool_not_found")
    assert (await put(inside, "absent", size=0)).status_code == 200, "a pool whose image has gone can be drained"


async def test_a_pool_that_does_not_fit_says_why(inside: ManagerInside) -> None:
    said = (await put(inside, size=2, memory_mib=800_000)).json()
    assert said["failure"]["code"] == "insufficient_capacity"
    assert said["failure"]["hint"]
    assert said["ready"] + said["coming"] == 1


async def test_a_refreshed_image_replaces_what_waits(inside: ManagerInside) -> None:
    await put(inside, size=1)
    await until_ready(inside)
    old = set(inside.vmm.running)
    built = await inside.client.post("/api/v1/images/base/build", json={"refresh": True})
    newest = json.loads(built.text.splitlines()[-1])["image"]["id"]
    await inside.installation.lifecycle.warm_pools.keep()
    await until_ready(inside)
    assert not old & set(inside.vmm.running)
    made = await inside.client.post(SANDBOXES, params={"wait": True}, json={"name": "box"})
    assert made.json()["image_id"] == newest


async def test_the_manager_keeps_it_filled_by_itself(inside: ManagerInside) -> None:
    await put(inside, size=1)
    await until_ready(inside)
    (waiting,) = inside.vmm.running
    inside.vmm.end_machine(waiting)
    async with asyncio.timeout(60):
        while waiting in inside.vmm.running or not inside.vmm.running:
            await asyncio.sleep(0.05)


async def test_the_manager_ends_with_the_pools(inside: ManagerInside) -> None:
    await put(inside, size=2)
    await until_ready(inside)
    changed, running = await inside.installation.end_sandboxes("stop")
    assert (changed, running) == ([], [])
    assert inside.vmm.running == []


# -- SDK -----------------------------------------------------------------------------------------------------------


def test_the_sdk(connection: Connection) -> None:
    said = WarmPool.set("base", 1, memory_mib=1024, connection=connection)
    assert (said.size, said.vcpu_count, said.memory_mib) == (1, 1, 1024)

    def is_ready() -> bool:
        return [each.ready for each in WarmPool.list(connection=connection)] == [1]

    wait_until(is_ready)
    with Sandbox.create(memory_mib=1024, connection=connection) as box:
        assert box.run(["echo", "here"]).stdout == "here\n"
    with pytest.raises(InvalidRequestError):
        WarmPool.set("base", -1, connection=connection)
    WarmPool.drain("base", connection=connection)
    assert WarmPool.list(connection=connection) == []
    with pytest.raises(NotFoundError):
        WarmPool.drain("base", connection=connection)


async def test_the_sdk_on_asyncio(inside: ManagerInside) -> None:
    key = inside.client.headers["Authorization"].removeprefix("Bearer ")
    transport = httpx.ASGITransport(inside.installation.application)
    async with AsyncConnection(Endpoint("http://127.0.0.1", key), transport=transport) as link:
        said = await AsyncWarmPool.set("base", 2, vcpu_count=2, connection=link)
        assert isinstance(said, WarmPoolDetails)
        assert (said.size, said.vcpu_count) == (2, 2)
        assert [each.size for each in await AsyncWarmPool.list(connection=link)] == [2]
        await AsyncWarmPool.drain("base", connection=link)
        assert await AsyncWarmPool.list(connection=link) == []


# -- command line --------------------------------------------------------------------------------------------------


def test_the_command_line(connection: Connection, manager: RunningManager, tmp_path: Path) -> None:
    cli = Cli(manager, tmp_path)
    assert cli.run("pool").stdout == b"no warm pools; `atelier pool set base --size 5` makes one\n"
    assert b"base  " in cli.run("pool", "set", "base", "--size", "2", "--cpus", "2", "--memory", "1G").stdout

    def is_ready() -> bool:
        return [each["ready"] for each in json.loads(cli.run("pool", "ls", "--json").stdout)] == [2]

    wait_until(is_ready)
    heading, row = cli.run("pool", "ls").stdout.decode().splitlines()
    assert heading.split() == ["IMAGE", "VCPUS", "MEMORY", "SIZE", "READY", "COMING"]
    assert row.split() == ["base", "2", "1", "GiB", "2", "2", "0"]
    assert json.loads(cli.run("pool", "set", "base", "-n", "1", "--json").stdout)["size"] == 1
    assert b"absent" in cli.run("pool", "set", "absent", "-n", "1", status=1).stderr
    assert b"--size" in cli.run("pool", "set", "base", status=2).stderr
    short = cli.run("pool", "set", "base", "-n", "2", "--memory", "800000").stderr
    assert b"it stays short: " in short
    assert json.loads(cli.run("pool", "drain", "base", "--json").stdout) == {"drained": "base"}
    assert b"no warm pool" in cli.run("pool", "drain", "base", status=1).stderr
