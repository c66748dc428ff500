"""What the gateway makes of the manager's answers about SSH, and of none."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atelier.gateway.ssh_entry import ManagerDoor
from atelier.host.line_server import Answer, LineServer, Request, ask
from atelier.model.errors import AccessDeniedError, PreconditionError, TransientError


class Manager:
    """Lets ``allowed`` keys in."""

    def __init__(self, path: Path) -> None:
        self.allowed = {"good"}
        self.asked: list[Request] = []
        self.path = path
        self.server = LineServer(path, self.answer)

    async def answer(self, request: Request, asker: int) -> Answer:
        self.asked.append(request)
        if request["key"] not in self.allowed:
            raise AccessDeniedError("no", code="ssh_refused")
        if request["operation"] == "ssh_enter":
            raise PreconditionError("sandbox box is failed", code="sandbox_not_running")
        return {"ok": True, "sandbox_id": "abcdefghjkmn"}

    async def end(self) -> None:
        await self.server.close()


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="atl-") as folder:
        made = Manager(Path(folder) / "manager.sock")
        await made.server.open()
        yield made
        await made.end()


async def test_a_yes_outlives_the_manager_and_a_no_does_not_become_one(manager: Manager) -> None:
    door = ManagerDoor(manager.path)
    assert await door.find("box", "good") == "abcdefghjkmn"
    with pytest.raises(AccessDeniedError):
        await door.find("box", "bad")
    await manager.end()
    assert await door.find("box", "good") == "abcdefghjkmn"
    for reference, key in (("box", "bad"), ("other", "good")):
        with pytest.raises(TransientError):
            await door.find(reference, key)


async def test_the_manager_is_asked_each_time_and_its_no_ends_what_it_said_before(manager: Manager) -> None:
    door = ManagerDoor(manager.path)
    await door.find("box", "good")
    manager.allowed.clear()
    with pytest.raises(AccessDeniedError):
        await door.find("box", "good")
    await manager.end()
    with pytest.raises(TransientError):
        await door.find("box", "good")


async def test_entering_says_what_the_manager_says_and_needs_none(manager: Manager) -> None:
    door = ManagerDoor(manager.path)
    with pytest.raises(PreconditionError, match="box is failed"):
        await door.enter("abcdefghjkmn", "good", "127.0.0.1")
    await manager.end()
    await door.enter("abcdefghjkmn", "good", "127.0.0.1")


async def test_the_socket_is_closed_to_others_and_survives_nonsense(manager: Manager) -> None:
    assert manager.path.stat().st_mode & 0o777 == 0o600
    answer = await ask(manager.path, {"operation": "ssh_find"})
    assert (answer["ok"], answer["code"]) == (False, "internal")
    assert (await ask(manager.path, {"key": "good"}))["code"] == "internal"
    assert (await ask(manager.path, {"operation": "ssh_known", "key": "good"}))["ok"] is True
