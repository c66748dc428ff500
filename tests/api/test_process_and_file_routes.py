"""Processes, files, terminals and events over the API, on the fake guest."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator

import httpx
from tests.running_manager import RunningManager
from websockets.sync.client import connect


def run(api: httpx.Client, sandbox: str, *command: str, **options: object) -> dict[str, object]:
    answer = api.post(f"/api/v1/sandboxes/{sandbox}/run", json={"command": list(command), **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_run(api: httpx.Client, sandbox: str) -> None:
    assert run(api, sandbox, "true")["exit_code"] == 0
    assert run(api, sandbox, "false")["exit_code"] == 1
    assert run(api, sandbox, "exit", "3")["exit_code"] == 3
    assert run(api, sandbox, "echo", "grüezi")["stdout"] == "grüezi\n"
    assert run(api, sandbox, "cat", input="in and out")["stdout"] == "in and out"
    unknown = run(api, sandbox, "frobnicate")
    assert unknown["exit_code"] == 127
    assert "frobnicate" in str(unknown["stderr"])
    cut = run(api, sandbox, "echo", "0123456789", output_limit_bytes=4)
    assert (cut["stdout"], cut["stdout_truncated"]) == ("0123", True)
    assert run(api, sandbox, "echo", "x", encoding="base64")["stdout"] == base64.b64encode(b"x\n").decode()


def test_run_ends_by_its_time_limit(api: httpx.Client, sandbox: str) -> None:
    ended = run(api, sandbox, "sleep", "600", timeout_seconds=0.2)
    assert ended["error"] == "timeout"
    assert ended["exit_code"] != 0


def test_exec_streams_and_takes_input_and_signals(api: httpx.Client, sandbox: str) -> None:
    base = f"/api/v1/sandboxes/{sandbox}"
    with api.stream("POST", f"{base}/exec", json={"command": ["cat"], "stdin": True}) as answer:
        lines = answer.iter_lines()
        pid = json.loads(next(lines))["pid"]
        listed = api.get(f"{base}/processes").json()["items"]
        assert [process["pid"] for process in listed] == [pid]
        assert api.post(f"{base}/processes/{pid}/stdin", content=b"\x00\xff").status_code == 204
        output = json.loads(next(lines))
        assert (output["type"], base64.b64decode(output["data"])) == ("output", b"\x00\xff")
        assert api.delete(f"{base}/processes/{pid}/stdin").status_code == 204
        assert json.loads(next(lines)) == {"type": "ended", "exit_code": 0, "status": "exit status 0", "error": ""}
    with api.stream("POST", f"{base}/exec", json={"command": ["sleep", "600"]}) as answer:
        lines = answer.iter_lines()
        pid = json.loads(next(lines))["pid"]
        assert api.post(f"{base}/processes/{pid}/signal", json={"signal": "KILL"}).status_code == 204
        assert json.loads(next(lines))["exit_code"] == 137
    assert api.post(f"{base}/processes/{pid}/signal", json={"signal": "SIGNOPE"}).status_code == 422
    assert api.post(f"{base}/processes/999999/signal", json={}).json()["code"] == "process_not_found"


def test_a_client_that_detaches_can_attach_again(api: httpx.Client, sandbox: str) -> None:
    base = f"/api/v1/sandboxes/{sandbox}"
    with api.stream("POST", f"{base}/exec", json={"command": ["cat"], "stdin": True}) as answer:
        pid = json.loads(next(answer.iter_lines()))["pid"]
    api.post(f"{base}/processes/{pid}/stdin", content=b"kept").raise_for_status()
    with api.stream("GET", f"{base}/processes/{pid}/output") as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines))["pid"] == pid
        assert base64.b64decode(json.loads(next(lines))["data"]) == b"kept"
        api.delete(f"{base}/processes/{pid}/stdin")
        assert json.loads(next(lines))["exit_code"] == 0


def test_files(api: httpx.Client, sandbox: str) -> None:
    files = f"/api/v1/sandboxes/{sandbox}/files"
    content = bytes(range(256)) * 5000

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(content), 100_000):
            yield content[start : start + 100_000]

    written = api.put(files, params={"path": "/home/user/ä file"}, content=pieces())
    assert written.status_code == 200, written.text
    assert written.json()["size_bytes"] == len(content)
    assert api.get(files, params={"path": "/home/user/ä file"}).content == content
    part = api.get(files, params={"path": "/home/user/ä file"}, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
    tail = api.get(files, params={"path": "/home/user/ä file"}, headers={"Range": "bytes=-7"})
    assert tail.content == content[-7:]
    beyond = api.get(files, params={"path": "/home/user/ä file"}, headers={"Range": "bytes=99999999-"})
    assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
    assert api.put(f"{files}?path=/home/user/%ff%fe", content=b"bytes").status_code == 200
    assert api.get(f"{files}?path=/home/user/%ff%fe").content == b"bytes"
    names = [entry["name"] for entry in api.get(f"{files}/list", params={"path": "/home/user"}).json()["items"]]
    assert "ä file" in names
    assert base64.b64decode(api.get(f"{files}/stat?path=/home/user/%ff%fe").json()["path_base64"]).endswith(b"\xff\xfe")
    moved = api.post(f"{files}/move", json={"source": "/home/user/ä file", "destination": "/home/user/b"})
    assert moved.json()["path"] == "/home/user/b"
    assert api.post(f"{files}/directory", params={"path": "/home/user/d/e"}).status_code == 201
    assert api.delete(files, params={"path": "/home/user/d"}).status_code == 204
    missing = api.get(files, params={"path": "/home/user/gone"})
    assert (missing.status_code, missing.json()["code"]) == (404, "path_not_found")
    for bad in ("", "a\0b", "x" * 5000):
        assert api.get(files, params={"path": bad}).json()["code"] == "invalid_path"


def test_a_sandbox_that_does_not_run_cannot_be_entered(api: httpx.Client) -> None:
    answer = api.post("/api/v1/sandboxes/no-such/run", json={"command": ["true"]})
    assert (answer.status_code, answer.json()["code"]) == (404, "sandbox_not_found")


def test_terminal(manager: RunningManager, sandbox: str) -> None:
    url = manager.url.replace("http", "ws") + f"/api/v1/sandboxes/{sandbox}/pty?command=cat&columns=100&rows=30"
    with connect(url, additional_headers={"Authorization": f"Bearer {manager.key}"}) as socket:
        assert json.loads(socket.recv(timeout=10))["type"] == "started"
        socket.send(json.dumps({"type": "resize", "columns": 120, "rows": 40}))
        socket.send("not json, passed over")
        socket.send(b"hello\r")
        received = b""
        while b"hello" not in received:
            piece = socket.recv(timeout=10)
            assert isinstance(piece, bytes)
            received += piece
        socket.send(b"\x04")
        while isinstance(message := socket.recv(timeout=10), bytes):
            pass
        assert json.loads(message)["type"] == "ended"


def test_events_resume(manager: RunningManager, api: httpx.Client) -> None:
    def read(after: str | None, count: int, ready: threading.Event | None = None) -> list[dict[str, object]]:
        headers = {"Last-Event-ID": after} if after is not None else {}
        events: list[dict[str, object]] = []
        with manager.client() as client, client.stream("GET", "/api/v1/events", headers=headers) as answer:
            for line in answer.iter_lines():
                if ready is not None:
                    ready.set()
                if line.startswith("data: "):
                    events.append(json.loads(line[6:]))
                    if len(events) == count:
                        break
        return events

    seen: list[dict[str, object]] = []
    ready = threading.Event()
    reader = threading.Thread(target=lambda: seen.extend(read(None, 2, ready)))
    reader.start()
    assert ready.wait(20)
    created = api.post("/api/v1/sandboxes", params={"wait": True}, json={}).json()
    reader.join(20)
    assert len(seen) == 2
    assert {event["sandbox_id"] for event in seen} == {created["id"]}
    again = read(str(int(str(seen[0]["id"]))), 1)
    assert again == [seen[1]]
