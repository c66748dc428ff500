"""Terminals that live on, in a real guest: they outlive gateway, manager and a pause, and a stop ends them."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.api.cli_program import Cli
from tests.footprint import gateway_pid
from tests.running_manager import WITH_TEMPLATES, RunningManager, local_installation, wait_until
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from atelier import Sandbox
from atelier.model.guest import ProcessEnded, ProcessOutput


class Viewer:
    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.seen = b""

    def type(self, text: str) -> None:
        self.socket.send(text.encode())

    def read_until(self, wanted: bytes) -> bytes:
        """All that was shown, up to where ``wanted`` stands in it, or the message of that name has come."""
        while wanted not in self.seen:
            frame = self.socket.recv(timeout=120)
            if isinstance(frame, bytes):
                self.seen += frame
            elif json.loads(frame)["type"].encode() == wanted:
                break
        return self.seen

    def say(self, **message: object) -> None:
        self.socket.send(json.dumps(message))


@contextmanager
def view(manager: RunningManager, terminal: str, columns: int = 100, rows: int = 40) -> Iterator[Viewer]:
    path = f"/api/v1/sandboxes/box/terminals/{terminal}/attach?columns={columns}&rows={rows}"
    headers = {"Authorization": f"Bearer {manager.key}"}
    host, _, port = manager.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port))) as carrier:
        # Little of what is not read waits here.
        carrier.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        # Nor does it wait long, as it leaves, for an answer behind what it has not read.
        url = "ws" + manager.url.removeprefix("http") + path
        with connect(url, sock=carrier, additional_headers=headers, close_timeout=0.5) as opened:
            yield Viewer(opened)


def replay(manager: RunningManager, terminal: str) -> bytes:
    """What a new viewer is shown first, once the way to the guest is there again."""

    def shown() -> bytes:
        try:
            with view(manager, terminal) as viewer:
                return viewer.read_until(b"replayed")
        except (WebSocketException, TimeoutError):
            return b""

    return wait_until(shown)


def test_a_terminal_outlives_all_but_its_sandbox() -> None:
    with local_installation(WITH_TEMPLATES) as host:
        manager = host.manager
        host.create("box")
        opened = host.call("POST", "/sandboxes/box/terminals", {"command": ["/bin/sh"]}, expected=201)
        terminal = opened["id"]
        with view(manager, terminal) as first, view(manager, terminal, 90, 30) as second:
            second.read_until(b"replayed")
            first.type("stty size; echo both-$((40 + 2))\r")
            assert b"30 90" in first.read_until(b"both-42\r\n")
            assert second.read_until(b"both-42\r\n").endswith(first.seen[-20:]), "both see the same bytes"
            second.say(type="resize", columns=70, rows=20)
            second.type("sleep 1; stty size; echo resized-$((1 + 1))\r")
            assert b"20 70" in first.read_until(b"resized-2\r\n")
            # Neither reads any more: the program ends its work all the same.
            first.type("seq 300000; printf '\\033]2;wri%s\\007' tten\r")
            wait_until(lambda: host.call("GET", "/sandboxes/box/terminals")["items"][0]["title"] == "written", 600)
        shown = replay(manager, terminal)
        assert b"300000\r\n" in shown
        assert len(shown) <= 1024 * 1024 + 4096
        before = gateway_pid(manager)
        os.kill(before, signal.SIGKILL)
        assert b"300000\r\n" in replay(manager, terminal)
        assert gateway_pid(manager) != before
        host.kill()
        manager = host.start()
        assert b"300000\r\n" in replay(manager, terminal)
        with view(manager, terminal) as viewer:
            viewer.read_until(b"replayed")
            host.call("POST", "/sandboxes/box/pause?wait=true")
            # It breaks off, and is no end of the program.
            viewer.read_until(b"failed")
        host.call("POST", "/sandboxes/box/resume?wait=true")
        with view(manager, terminal) as viewer:
            viewer.read_until(b"replayed")
            viewer.type("echo still-$((3 + 4))\r")
            viewer.read_until(b"still-7\r\n")
        host.call("POST", "/sandboxes/box/stop?wait=true")
        host.call("POST", "/sandboxes/box/start?wait=true")
        assert host.call("GET", "/sandboxes/box/terminals")["items"] == []


def test_the_command_line_and_the_sdk_share_a_terminal(
    sandbox: Sandbox, local_manager: RunningManager, tmp_path: Path
) -> None:
    cli = Cli(local_manager, tmp_path)
    session = cli.open_terminal("shell", "--session", "work", sandbox.name, columns=90, rows=20)
    try:
        session.wait_raw()
        session.type(b"stty size; echo first-$((40 + 2))\r")
        session.expect(rb"20 90\r\nfirst-42\r\n")
        session.type(b"\x1d\x1d\x1d")
        assert session.wait() == 0
    finally:
        session.close()
    (listed,) = sandbox.terminals.list()
    assert (listed.title, listed.columns, listed.rows, listed.viewers) == ("work", 90, 20, 0)
    with sandbox.terminals.attach(listed.id) as viewer:
        viewer.send(b"exit 3\r")
        events = list(viewer)
    assert b"first-42\r\n" in b"".join(event.data for event in events if isinstance(event, ProcessOutput))
    assert isinstance(events[-1], ProcessEnded)
    assert events[-1].exit_code == 3
    # One that takes no notice is ended by force, with all that it runs.
    stubborn = sandbox.terminals.open("trap '' HUP; sleep 86413 & echo begun; wait; sleep 86413", title="stubborn")
    with sandbox.terminals.attach(stubborn.id) as viewer:
        next(event for event in viewer if isinstance(event, ProcessOutput) and b"begun" in event.data)
        assert cli.run("terminal-close", sandbox.name, "stubborn").stdout.decode().split() == [stubborn.id]
        assert isinstance(list(viewer)[-1], ProcessEnded)
    wait_until(lambda: sandbox.run(["pgrep", "-f", "sleep 86413"]).exit_code == 1)
    sandbox.terminals.close(listed.id)
    assert sandbox.terminals.list() == []
