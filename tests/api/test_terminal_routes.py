"""Terminals over HTTP and WebSocket, and who may look at them from a browser."""

from __future__ import annotations

import json

import httpx
import pytest
from tests.api.headless_browser import skip_without_packages
from tests.running_manager import RunningManager
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

ROOM = "/api/v1/sandboxes/{}/terminals"


def attach(
    manager: RunningManager, sandbox: str, terminal: str, *, origin: str = "", wake: bool = True
) -> ClientConnection:
    query = f"columns=100&rows=30&wake={wake}"
    url = "ws" + manager.url.removeprefix("http") + ROOM.format(sandbox) + f"/{terminal}/attach?{query}"
    headers = {"Authorization": f"Bearer {manager.key}"} | ({"Origin": origin} if origin else {})
    return connect(url, additional_headers=headers)


def read_until(socket: ClientConnection, *, data: bytes = b"", kind: str = "") -> tuple[bytes, list[dict[str, object]]]:
    """All bytes and messages up to where ``data`` was seen, or a message of this kind came."""
    seen, said = b"", list[dict[str, object]]()
    while True:
        frame = socket.recv(timeout=30)
        if isinstance(frame, bytes):
            seen += frame
        else:
            said.append(json.loads(frame))
        if (data and data in seen) or (kind and said and said[-1]["type"] == kind):
            return seen, said


def test_a_terminal_lives_on_without_its_socket(manager: RunningManager, api: httpx.Client, sandbox: str) -> None:
    room = ROOM.format(sandbox)
    made = api.post(room, json={"title": "work"})
    assert made.status_code == 201, made.text
    terminal = made.json()["id"]
    with attach(manager, sandbox, terminal) as socket:
        _, said = read_until(socket, kind="replayed")
        assert said[0]["type"] == "joined"
        assert said[0]["terminal"]["columns"] == 100  # type: ignore[index]
        socket.send(b"echo told once\r")
        read_until(socket, data=b"\r\ntold once\r\n")
    with attach(manager, sandbox, terminal) as socket:
        seen, said = read_until(socket, kind="replayed")
        assert b"\r\ntold once\r\n" in seen
        socket.send(b"exit 3\r")
        _, said = read_until(socket, kind="ended")
        assert said[-1]["exit_code"] == 3
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)
    (listed,) = api.get(room).json()["items"]
    assert (listed["id"], listed["title"], listed["exit_code"]) == (terminal, "work", 3)
    assert api.patch(f"{room}/{terminal}", json={"title": "done"}).json()["title"] == "done"
    assert api.delete(f"{room}/{terminal}").status_code == 204
    assert api.get(room).json()["items"] == []
    assert api.delete(f"{room}/{terminal}").json()["code"] == "terminal_not_found"


@pytest.mark.parametrize("origin", ["http://evil.example", "http://8080-box.127.0.0.1:1", "null", "https://{host}"])
def test_pages_of_others_get_no_terminal(manager: RunningManager, api: httpx.Client, sandbox: str, origin: str) -> None:
    terminal = api.post(ROOM.format(sandbox), json={"command": ["cat"]}).json()["id"]
    host = manager.url.partition("//")[2]
    with pytest.raises(InvalidStatus) as caught, attach(manager, sandbox, terminal, origin=origin.format(host=host)):
        pass
    assert caught.value.response.status_code == 403
    with attach(manager, sandbox, terminal, origin=manager.url) as socket:
        read_until(socket, kind="replayed")
    api.delete(f"{ROOM.format(sandbox)}/{terminal}")


def test_a_window_that_comes_back_by_itself_wakes_no_sandbox(
    manager: RunningManager, api: httpx.Client, sandbox: str
) -> None:
    terminal = api.post(ROOM.format(sandbox), json={"command": ["cat"]}).json()["id"]
    assert api.post(f"/api/v1/sandboxes/{sandbox}/pause?wait=true").json()["state"] == "paused"
    with attach(manager, sandbox, terminal, wake=False) as socket:
        _, said = read_until(socket, kind="failed")
        assert "paused" in str(said[-1]["message"])
    assert api.get(f"/api/v1/sandboxes/{sandbox}").json()["state"] == "paused"
    with attach(manager, sandbox, terminal) as socket:
        read_until(socket, kind="replayed")
    assert api.get(f"/api/v1/sandboxes/{sandbox}").json()["state"] == "running"


def test_what_makes_no_sense(manager: RunningManager, api: httpx.Client, sandbox: str) -> None:
    room = ROOM.format(sandbox)
    assert api.post(room, json={"size": {"columns": 0, "rows": 24}}).status_code == 422
    assert api.post(room, json={"title": "x" * 201}).status_code == 422
    assert api.patch(f"{room}/../x", json={}).status_code in (404, 405, 422)
    with attach(manager, sandbox, "0000") as socket:
        _, said = read_until(socket, kind="failed")
        assert said[-1]["code"] == "terminal_not_found"


def test_the_page_takes_no_script_but_its_own(api: httpx.Client, sandbox: str) -> None:
    assert api.get("/terminal-assets/terminal.js").status_code == 200
    assert api.get("/terminal-assets/terminal.html").status_code in (404, 503)
    page = api.get(f"/sandboxes/{sandbox}/terminal")
    skip_without_packages(page)
    assert "script-src 'self';" in page.headers["content-security-policy"]
    assert sandbox not in page.text
    assert "Terminal" in api.get("/terminal-assets/xterm.js").text
    assert api.get("/sandboxes/no-such/terminal").status_code == 404
