"""Watches of the guest agent: what is seen, what is bounded, what is told of loss."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_files_server import call, file_services

from atelier.guest_agent import folder_watch
from atelier.guest_agent import watch as watch_service

ME = "me" if os.getuid() else "root"
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
async def client(tmp_path: Path, home: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with file_services(tmp_path, home, default_user=ME) as client:
        yield client


class Watcher:
    def __init__(self, client: httpx.AsyncClient, identifier: str) -> None:
        self.client = client
        self.identifier = identifier

    async def raw(self) -> list[dict[str, Any]]:
        answer = await call(self.client, "GetWatcherEvents", watcherId=self.identifier)
        assert answer.status_code == 200
        return answer.json()["events"]

    async def events(self) -> list[tuple[str, str]]:
        return [(event["name"], event["type"].removeprefix("EVENT_TYPE_")) for event in await self.raw()]


async def watcher(client: httpx.AsyncClient, **message: object) -> Watcher:
    answer = await call(client, "CreateWatcher", **message)
    assert answer.status_code == 200, answer.text
    return Watcher(client, answer.json()["watcherId"])


async def upload(client: httpx.AsyncClient, path: str, content: bytes = b"x") -> None:
    answer = await client.post("/files", params={"path": path}, content=content, headers=OCTETS)
    assert answer.status_code == 200


async def test_an_upload_is_create_chmod_write(client: httpx.AsyncClient, home: Path) -> None:
    seen = await watcher(client, path="")
    await upload(client, "f", b"x" * 1_000_000)
    assert await seen.events() == [("f", "CREATE"), ("f", "CHMOD"), ("f", "WRITE")]
    (home / "f").chmod(0o600)
    assert await seen.events() == [("f", "CHMOD")]
    await upload(client, "f", b"y")
    assert await seen.events() == [("f", "CHMOD"), ("f", "WRITE")]
    assert await seen.events() == []


async def test_what_programs_do(client: httpx.AsyncClient, home: Path) -> None:
    seen = await watcher(client, path="")
    (home / "f").write_text("x")
    assert await seen.events() == [("f", "CREATE"), ("f", "WRITE")]
    (home / "f").rename(home / "g")
    assert await seen.events() == [("f", "RENAME"), ("g", "CREATE")]
    (home / "g").unlink()
    assert await seen.events() == [("g", "REMOVE")]
    (home / "sub").mkdir()
    (home / "sub/inner").touch()
    assert await seen.events() == [("sub", "CREATE")]
    nameless = os.open(home, os.O_TMPFILE | os.O_WRONLY, 0o600)
    os.write(nameless, b"x")
    os.fchmod(nameless, 0o644)
    os.close(nameless)
    assert await seen.events() == []
    (home / "#123").touch()
    (home / "#123").chmod(0o600)
    assert await seen.events() == [("#123", "CREATE"), ("#123", "CHMOD")]


async def test_recursive(client: httpx.AsyncClient, home: Path) -> None:
    (home / "old/deep").mkdir(parents=True)
    seen = await watcher(client, path="", recursive=True)
    await upload(client, "old/deep/f")
    assert await seen.events() == [("old/deep/f", kind) for kind in ("CREATE", "CHMOD", "WRITE")]
    # A whole tree before anybody reads: everything in it is told once.
    (home / "new/a/b").mkdir(parents=True)
    (home / "new/a/b/f").touch()
    assert sorted(await seen.events()) == [
        ("new", "CREATE"), ("new/a", "CREATE"), ("new/a/b", "CREATE"), ("new/a/b/f", "CREATE"),
    ]  # fmt: skip
    (home / "new/a/b/g").touch()
    assert await seen.events() == [("new/a/b/g", "CREATE")]
    (home / "new").rename(home / "moved")
    assert await seen.events() == [("new", "RENAME"), ("moved", "CREATE")]
    (home / "moved/a/h").touch()
    assert await seen.events() == [("moved/a/h", "CREATE")]
    (home / "moved/a/h").unlink()
    (home / "moved/a/h").touch()
    assert await seen.events() == [("moved/a/h", "REMOVE"), ("moved/a/h", "CREATE")]


async def test_entries_and_binary_names(client: httpx.AsyncClient, home: Path) -> None:
    seen = await watcher(client, path="", includeEntry=True)
    with open(bytes(home) + b"/\xff", "wb"):
        pass
    [event] = await seen.raw()
    assert (event["name"], event["nameBytes"], event["entry"]["type"]) == ("\ufffd", "/w==", "FILE_TYPE_FILE")
    os.unlink(bytes(home) + b"/\xff")
    [event] = await seen.raw()
    assert (event["type"], "entry" in event) == ("EVENT_TYPE_REMOVE", False)


async def test_loss_is_marked_in_its_place(
    client: httpx.AsyncClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_watch, "QUEUE_MAX_EVENTS", 10)
    seen = await watcher(client, path="")
    for number in range(30):
        (home / f"{number:02}").mkdir()
    events = [*await seen.raw(), *await seen.raw()]
    kept = [event["name"] for event in events if event["name"]]
    lost = [event["lost"] for event in events if not event["name"]]
    assert kept == [f"{number:02}" for number in range(9)]
    assert sum(lost) == 21
    (home / "after").mkdir()
    assert await seen.events() == [("after", "CREATE")]


async def test_what_cannot_be_watched(client: httpx.AsyncClient, home: Path) -> None:
    (home / "f").touch()
    assert (await call(client, "CreateWatcher", path="absent")).json()["code"] == "not_found"
    assert (await call(client, "CreateWatcher", path="f")).json()["code"] == "invalid_argument"
    assert (await call(client, "GetWatcherEvents", watcherId="nonesuch")).json()["code"] == "not_found"
    assert (await call(client, "RemoveWatcher", watcherId=7)).json()["code"] == "not_found"


async def test_watchers_are_counted_and_the_forgotten_give_way(
    client: httpx.AsyncClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_service, "WATCHERS_MAX", 2)
    first = await watcher(client, path="")
    second = await watcher(client, path="")
    assert (await call(client, "CreateWatcher", path="")).json()["code"] == "resource_exhausted"
    await first.events()
    monkeypatch.setattr(watch_service, "_IDLE_SECONDS", 0.0)
    third = await watcher(client, path="")
    assert (await call(client, "GetWatcherEvents", watcherId=second.identifier)).status_code == 404
    for left in (first, third):
        assert await left.events() == []
        assert (await call(client, "RemoveWatcher", watcherId=left.identifier)).status_code == 200


async def frames(response: httpx.Response) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    held = b""
    async for chunk in response.aiter_bytes():
        held += chunk
        while len(held) >= 5 and len(held) >= 5 + int.from_bytes(held[1:5], "big"):
            end = 5 + int.from_bytes(held[1:5], "big")
            yield held[0], json.loads(held[5:end])
            held = held[end:]


def stream(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **message: object) -> Any:
    body = json.dumps(message).encode()
    return client.stream(
        "POST",
        "/filesystem.Filesystem/WatchDir",
        content=b"\0" + len(body).to_bytes(4, "big") + body,
        headers={"content-type": "application/connect+json", **(headers or {})},
    )


async def test_stream_of_events_with_keepalive_and_deadline(client: httpx.AsyncClient, home: Path) -> None:
    headers = {"keepalive-ping-interval": "1", "connect-timeout-ms": "1500"}
    async with stream(client, headers, path="") as response:
        messages = frames(response)
        assert await anext(messages) == (0, {"start": {}})
        await upload(client, "f")
        for kind in ("CREATE", "CHMOD", "WRITE"):
            assert await anext(messages) == (0, {"filesystem": {"name": "f", "type": f"EVENT_TYPE_{kind}"}})
        assert await anext(messages) == (0, {"keepalive": {}})
        flags, end = await anext(messages)
        assert (flags, end["error"]["code"]) == (2, "deadline_exceeded")


async def test_stream_ends_with_its_folder(client: httpx.AsyncClient, home: Path) -> None:
    (home / "d").mkdir()
    async with stream(client, path="d", recursive=True) as response:
        messages = frames(response)
        assert await anext(messages) == (0, {"start": {}})
        (home / "d").rmdir()
        assert await anext(messages) == (0, {"filesystem": {"name": ".", "type": "EVENT_TYPE_REMOVE"}})
        assert await anext(messages) == (2, {})
    async with stream(client, path="d") as response:
        [(flags, end)] = [frame async for frame in frames(response)]
        assert (flags, end["error"]["code"]) == (2, "not_found")


async def test_a_watcher_that_leaves_frees_its_inotify(client: httpx.AsyncClient, home: Path) -> None:
    def instances() -> int:
        return sum(os.readlink(f"/proc/self/fd/{name}") == "anon_inode:inotify" for name in os.listdir("/proc/self/fd")
                   if os.path.lexists(f"/proc/self/fd/{name}"))  # fmt: skip

    before = instances()
    for _ in range(3):
        async with stream(client, path="") as response:
            assert await anext(frames(response)) == (0, {"start": {}})
    for _ in range(100):
        if instances() == before:
            break
        await asyncio.sleep(0.02)
    assert instances() == before
