"""What the gateway asks the manager about visitors, what it remembers, and what becomes of them while there is no manager."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from atelier.gateway import preview_door
from atelier.gateway.preview_door import PreviewDoor
from atelier.gateway.preview_headers import Arrival, PreviewRequest
from atelier.host.line_server import Answer, LineServer, Request
from atelier.model.preview_visit import Admitted, Answered

YES: Answer = {"ok": True, "sandbox_id": "abcdefghjkmn", "port": 8000}
NO: Answer = {"ok": True, "status": 401, "headers": [["content-length", "2"]], "body": "bm8="}
ADMITTED = Admitted("abcdefghjkmn", 8000)


class Manager:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers = YES
        self.asked: list[Request] = []
        self._server: LineServer | None = None

    async def start(self) -> None:
        self._server = LineServer(self.path, self._answer)
        await self._server.open()

    async def end(self) -> None:
        if self._server is not None:
            await self._server.close()

    async def _answer(self, request: Request, asker: int) -> Answer:
        del asker
        self.asked.append(request)
        return self.answers


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="atl-") as name:
        yield Path(name)


@pytest.fixture
async def manager(folder: Path) -> AsyncIterator[Manager]:
    made = Manager(folder / "manager.sock")
    await made.start()
    yield made
    await made.end()


def visit(target: str = "/", method: str = "GET", host: str = "8000-box.test", *lines: str) -> PreviewRequest:
    head = "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", *lines])
    return PreviewRequest(head.encode(), Arrival("127.0.0.1", "http"))


def admit_long_ago(door: PreviewDoor, seconds: float) -> None:
    door._known = {key: (at - seconds, admitted) for key, (at, admitted) in door._known.items()}


async def test_a_yes_is_good_for_a_moment_and_for_the_same_visitor_only(manager: Manager) -> None:
    door = PreviewDoor(manager.path)
    assert door.find_known(visit()) is None
    assert await door.ask(visit("/a?b")) == ADMITTED
    assert manager.asked[0]["target"] == "/a?b"
    assert door.find_known(visit("/another")) == ADMITTED
    for other in (
        visit(host="8001-box.test"), visit(method="POST"), visit("/.atelier/enter?code=x"),
        visit("/", "GET", "8000-box.test", "Cookie: atelier-preview=x"), visit("/", "GET", "8000-box.test", "Origin: x"),
        visit("/", "GET", "8000-box.test", "X-Atelier-Key: k"),
        visit("/", "GET", "8000-box.test", "Connection: upgrade", "Upgrade: websocket"),
    ):  # fmt: skip
        assert door.find_known(other) is None
    assert door.find_known(visit("/", "GET", "8000-box.test", "Cookie: theirs=1", "X-Other: 2")) == ADMITTED
    admit_long_ago(door, 2)
    assert door.find_known(visit()) is None
    manager.answers = NO
    assert isinstance(await door.ask(visit()), Answered)
    admit_long_ago(door, 0)
    assert door.find_known(visit()) is None, "a no takes back the yes"


async def test_who_was_let_in_stays_for_a_minute_while_the_manager_is_away(manager: Manager) -> None:
    door = PreviewDoor(manager.path, away_seconds=0.3)
    await door.ask(visit())
    await manager.end()
    admit_long_ago(door, 59)
    assert await door.ask(visit("/b")) == ADMITTED
    own = await door.ask(visit("/.atelier/enter?code=x"))
    assert isinstance(own, Answered), "what is the manager's own, nobody else answers"
    admit_long_ago(door, 1)
    away = await door.ask(visit())
    assert isinstance(away, Answered)
    assert (away.status, b"manager_away" in away.body) == (503, True)


async def test_who_is_not_known_waits_for_a_manager_that_comes_back(manager: Manager) -> None:
    door = PreviewDoor(manager.path)
    await manager.end()
    waiting = [asyncio.create_task(door.ask(visit(f"/{number}"))) for number in range(20)]
    await asyncio.sleep(0.3)
    assert not any(each.done() for each in waiting)
    await manager.start()
    assert await asyncio.gather(*waiting) == [ADMITTED] * 20


@pytest.mark.parametrize("answer", [{"ok": False, "message": "no"}, {"ok": True}, {"ok": True, "sandbox_id": "x"}])
async def test_nonsense_is_not_waited_for(manager: Manager, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_door, "_AWAY_PAUSE_SECONDS", (1000, 1000))
    manager.answers = answer
    found = await PreviewDoor(manager.path).ask(visit())
    assert isinstance(found, Answered)
    assert found.status == 503
