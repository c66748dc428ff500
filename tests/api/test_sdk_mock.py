"""``Sandbox`` and ``AsyncSandbox`` against a manager in mock mode."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.running_manager import RunningManager

from atelier import AsyncSandbox, Sandbox
from atelier.client.connection import AsyncConnection, Connection
from atelier.client.environment import Endpoint
from atelier.client.events import follow_events
from atelier.model.errors import (
    AuthenticationError,
    ConflictError,
    GuestError,
    InvalidRequestError,
    NotFoundError,
    TransientError,
)
from atelier.model.guest import EntryType, ProcessEnded, ProcessOutput, ProcessStarted, TerminalSize
from atelier.schemas.terminals import JoinedEvent, ReplayedEvent, ResizedEvent, TitleEvent

from .cli_program import Cli


@pytest.fixture
def connection(manager: RunningManager, api: httpx.Client) -> Iterator[Connection]:
    del api  # destroys what a test leaves
    with Connection(Endpoint(manager.url, manager.key)) as opened:
        yield opened


@pytest.fixture
def box(connection: Connection) -> Iterator[Sandbox]:
    with Sandbox.create(connection=connection) as created:
        yield created


def test_the_environment_finds_the_manager(manager: RunningManager, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATELIER_API_URL", "ATELIER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATELIER_DATA_DIR", str(manager.data_dir))
    with Sandbox.create(labels={"a": "b"}) as created:
        assert created.name in {each.name for each in Sandbox.list(labels={"a": "b"})}
        with Sandbox.connect(created.name) as again:
            assert again.id == created.id
            assert again.run(["true"]).exit_code == 0
    with pytest.raises(NotFoundError):
        Sandbox.connect(created.id)


def test_a_name_of_this_machine_needs_no_resolver(manager: RunningManager) -> None:
    port = manager.url.rpartition(":")[2]
    with Connection(Endpoint(f"http://localhost:{port}", manager.key)) as link:
        assert Sandbox.list(connection=link) == []
        with Sandbox.create(connection=link) as created, created.open_terminal(["echo", "x"]) as terminal:
            assert isinstance(list(terminal)[-1], ProcessEnded)


def test_a_wrong_key_is_said_so_everywhere(manager: RunningManager, box: Sandbox) -> None:
    with Connection(Endpoint(manager.url, "wrong")) as link:
        with pytest.raises(AuthenticationError):
            Sandbox.list(connection=link)
        with pytest.raises(AuthenticationError):
            next(follow_events(link))
        stranger = Sandbox(box.details, box._lease.__class__(link.endpoint, link))
        with pytest.raises(AuthenticationError):
            stranger.exec(["true"])
        with pytest.raises(AuthenticationError):
            stranger.open_terminal()


def test_runs(box: Sandbox) -> None:
    assert box.run(["echo", "grüezi"]).stdout == "grüezi\n"
    assert box.run(["cat"], input=b"\x00\xff", encoding="base64").stdout == "AP8="
    assert box.run(["cat"], input="text").stdout == "text"
    assert box.run(["sleep", "600"], timeout_seconds=0.2).error == "timeout"
    assert box.run(["echo", "0123456789"], output_limit_bytes=3).stdout_truncated
    with pytest.raises(GuestError) as caught:
        box.run(["exit", "7"], check=True)
    assert "status 7" in caught.value.message
    with pytest.raises(InvalidRequestError):
        box.run([])


def test_executions(box: Sandbox) -> None:
    with box.exec(["cat"], stdin=True) as execution:
        assert [each.pid for each in box.processes.list()] == [execution.pid]
        execution.write_stdin(b"abc")
        events = iter(execution)
        assert next(events) == ProcessStarted(execution.pid)
        assert next(events) == ProcessOutput("stdout", b"abc")
        with box.processes.attach(execution.pid) as second:
            execution.close_stdin()
            assert ProcessOutput("stdout", b"abc") in list(second)
        assert execution.wait().exit_code == 0
    with box.exec(["sleep", "600"]) as execution:
        execution.send_signal("KILL")
        assert execution.wait().exit_code == 137


def test_files(box: Sandbox, tmp_path: Path) -> None:
    data = os.urandom(1_500_000)
    assert box.files.write("data", data).size_bytes == len(data)
    assert box.files.read_bytes("data") == data
    assert box.files.read_bytes("data", offset=1000, length=17) == data[1000:1017]
    box.files.write(b"\xff name", io.BytesIO(data))
    box.files.download(b"\xff name", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    moved: list[int] = []
    box.files.upload(tmp_path / "back", "sub/up", on_progress=moved.append)
    assert sum(moved) == len(data)
    assert box.files.stat("sub/up").type is EntryType.FILE
    assert box.files.exists("sub") and not box.files.exists("absent")
    box.files.make_directory("made/deep")
    box.files.move("sub/up", "made/deep/moved")
    assert [entry.name for entry in box.files.list("made", depth=2)] == ["deep", "moved"]
    box.files.remove("made")
    assert not box.files.exists("made")
    with pytest.raises(InvalidRequestError):
        box.files.read("data")  # no text
    box.files.write("text", "grüezi")
    assert box.files.read("text") == "grüezi"
    with pytest.raises(NotFoundError) as caught:
        box.files.read("absent")
    assert caught.value.code == "path_not_found"
    with pytest.raises(InvalidRequestError):
        box.files.read_bytes("text", offset=100)


def test_folders(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_bytes(b"x" * 70_000)
    (tmp_path / "a/link").symlink_to("b/file")
    assert box.files.upload_folder(tmp_path / "a", "tree").file_count == 1
    report = box.files.download_folder("tree", tmp_path / "back")
    assert (report.file_count, report.link_count, report.skipped) == (1, 1, [])
    assert (tmp_path / "back/link").read_bytes() == b"x" * 70_000


def test_terminals(box: Sandbox) -> None:
    with box.open_terminal(["cat"], size=TerminalSize(100, 30)) as terminal:
        started = terminal.receive()
        assert isinstance(started, ProcessStarted)
        assert terminal._socket.socket.gettimeout() is None  # quiet terminals stay open
        terminal.resize(TerminalSize(120, 40))
        terminal.send(b"hi\r")
        seen = b""
        while seen.count(b"hi\r\n") < 2:
            event = terminal.receive()
            assert isinstance(event, ProcessOutput)
            seen += event.data
    with box.open_terminal(pid=started.pid) as terminal:
        terminal.send(b"\x04")
        assert list(terminal)[-1] == ProcessEnded(0, "exit status 0")
    with pytest.raises(NotFoundError):
        list(box.open_terminal(pid=999_999))


def output_until(terminal: Iterator[object], wanted: bytes) -> bytes:
    seen = b""
    for event in terminal:
        seen += event.data if isinstance(event, ProcessOutput) else b""
        if wanted in seen:
            return seen
    raise AssertionError(f"{wanted!r} did not come: {seen!r}")


def test_terminals_that_live_on(box: Sandbox) -> None:
    opened = box.terminals.open(["cat"], title="work", size=TerminalSize(100, 30))
    assert (opened.title, opened.columns, opened.rows, opened.viewers) == ("work", 100, 30, 0)
    with box.terminals.attach(opened.id, size=TerminalSize(90, 20)) as first, box.terminals.attach(opened.id) as second:
        joined = first.receive()
        assert isinstance(joined, JoinedEvent)
        assert (joined.terminal.id, joined.terminal.columns) == (opened.id, 90)
        said = [first.receive(), first.receive()]
        assert ReplayedEvent() in said
        assert ResizedEvent(columns=80, rows=20) in said, "the second window is narrower"
        first.send(b"hi\r")
        output_until(iter(second), b"hi\r\nhi\r\n")
        assert box.terminals.rename(opened.id, "other").title == "other"
        assert next(event for event in first if isinstance(event, TitleEvent)).title == "other"
    with box.terminals.attach(opened.id) as again:
        output_until(iter(again), b"hi\r\nhi\r\n")
        again.send(b"\x04")
        assert list(again)[-1] == ProcessEnded(0, "exit status 0")
    (listed,) = box.terminals.list()
    assert (listed.exit_code, listed.viewers) == (0, 0)
    box.terminals.close(opened.id)
    assert box.terminals.list() == []
    for call in (box.terminals.attach, box.terminals.close):
        with pytest.raises(NotFoundError) as caught:
            call(opened.id)
        assert caught.value.code == "terminal_not_found"
    with pytest.raises(InvalidRequestError):
        box.terminals.open(title="x" * 201)


def test_a_name_is_given_once(connection: Connection, box: Sandbox) -> None:
    with pytest.raises(ConflictError):
        Sandbox.create(name=box.name, connection=connection)


def test_the_console_and_figures(box: Sandbox) -> None:
    assert isinstance(box.read_console(limit_bytes=100), bytes)
    assert box.metrics().memory_total_bytes > 0
    assert box.refresh().state == "running"


async def test_the_same_on_asyncio(manager: RunningManager, api: httpx.Client, tmp_path: Path) -> None:
    async with AsyncConnection(Endpoint(manager.url, manager.key)) as connection:
        async with await AsyncSandbox.create(connection=connection) as box:
            results = await asyncio.gather(*(box.run(["echo", str(number)]) for number in range(20)))
            assert [result.stdout for result in results] == [f"{number}\n" for number in range(20)]
            async with await box.exec(["cat"], stdin=True) as execution:
                await execution.write_stdin(b"abc")
                await execution.close_stdin()
                events = [event async for event in execution]
            assert events[1:] == [ProcessOutput("stdout", b"abc"), ProcessEnded(0, "exit status 0")]
            await box.files.write("f", b"x" * 1_000_000)
            await box.files.download("f", tmp_path / "f")
            await box.files.upload(tmp_path / "f", "g")
            assert len(await box.files.read_bytes("g")) == 1_000_000
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder/x").write_text("x")
            await box.files.upload_folder(tmp_path / "folder", "tree")
            assert (await box.files.download_folder("tree", tmp_path / "back")).file_count == 1
            async with await box.open_terminal(["echo", "hi"]) as terminal:
                assert [type(event) for event in [event async for event in terminal]][-1] is ProcessEnded
            opened = await box.terminals.open(["cat"], title="work")
            async with await box.terminals.attach(opened.id) as viewer:
                assert isinstance(await viewer.receive(), JoinedEvent)
                await viewer.send(b"\x04")
                assert [event async for event in viewer][-1] == ProcessEnded(0, "exit status 0")
            assert (await box.terminals.rename(opened.id, "done")).title == "done"
            assert [each.exit_code for each in await box.terminals.list()] == [0]
            await box.terminals.close(opened.id)
            with pytest.raises(NotFoundError):
                await box.terminals.attach(opened.id)
            assert [each.id for each in await AsyncSandbox.list(connection=connection)] == [box.id]
            with pytest.raises(NotFoundError):
                await box.files.read("absent")
        assert await AsyncSandbox.list(connection=connection) == []


async def test_a_cancelled_block_takes_its_sandbox_with_it(manager: RunningManager, api: httpx.Client) -> None:
    async with AsyncConnection(Endpoint(manager.url, manager.key)) as connection:
        inside = asyncio.Event()

        async def work() -> None:
            async with await AsyncSandbox.create(connection=connection) as box:
                inside.set()
                await box.run(["sleep", "600"])

        task = asyncio.create_task(work())
        await asyncio.wait_for(inside.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await AsyncSandbox.list(connection=connection) == []


class Relay:
    """A TCP relay to the manager that can drop all connections, as a restart of something in between would.
    ``refused``: a connection on which a client says this is dropped too, and it alone."""

    def __init__(self, url: str) -> None:
        self.refused = b""
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._open += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.refused and self.refused in data:
                    break
                target.sendall(data)
        except OSError:
            pass
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.drop()


@pytest.fixture
def relay(manager: RunningManager) -> Iterator[Relay]:
    opened = Relay(manager.url)
    yield opened
    opened.close()


def test_a_broken_connection_is_no_result(relay: Relay, manager: RunningManager, box: Sandbox) -> None:
    with Connection(Endpoint(relay.url, manager.key)) as link:
        through = Sandbox.connect(box.id, connection=link)
        execution = through.exec(["sleep", "600"])
        relay.drop()
        with pytest.raises(TransientError) as caught:
            execution.wait()
        assert caught.value.code == "connection_lost"
        # The pool notices, and what may be asked again is.
        assert through.refresh().id == box.id
    assert [each.pid for each in box.processes.list()] == [execution.pid]


def test_a_shell_survives_a_broken_connection(
    relay: Relay, manager: RunningManager, box: Sandbox, tmp_path: Path
) -> None:
    cli = Cli(manager, tmp_path)
    environment = {**cli.environment, "ATELIER_API_URL": relay.url, "ATELIER_API_KEY": manager.key}
    through = Cli(dataclasses.replace(manager, environment=environment), tmp_path)
    session = through.open_terminal("shell", box.name, "cat")
    try:
        session.wait_raw()
        session.type(b"before\r")
        session.expect(b"before\r\nbefore\r\n")
        relay.drop()
        session.expect(b"connection lost, trying again")
        session.expect(b"before\r\nbefore\r\n")  # what the terminal kept
        session.type(b"after\r")
        session.expect(b"after\r\nafter\r\n")
        session.type(b"\x04")
        assert session.wait() == 0
        assert not session.is_raw()
    finally:
        session.close()


def test_a_terminal_that_lives_on_is_come_back_to(
    relay: Relay, manager: RunningManager, box: Sandbox, tmp_path: Path
) -> None:
    cli = Cli(manager, tmp_path)
    environment = {**cli.environment, "ATELIER_API_URL": relay.url, "ATELIER_API_KEY": manager.key}
    through = Cli(dataclasses.replace(manager, environment=environment), tmp_path)
    session = through.open_terminal("shell", "--session", "work", box.name, "cat")
    try:
        session.wait_raw()
        session.type(b"before\r")
        session.expect(b"before\r\nbefore\r\n")
        relay.drop()
        session.expect(b"connection lost, trying again")
        session.expect(b"before\r\nbefore\r\n")  # what was written before
        session.type(b"after\r")
        session.expect(b"after\r\nafter\r\n")
        # A pause is not undone by a window that is open.
        box.pause()
        assert session.wait() == 125
        assert b"is paused" in session.output
        assert box.refresh().state == "paused"
        assert not session.is_raw()
    finally:
        session.close()
    # Whoever comes anew wakes it.
    session = through.open_terminal("shell", "--session", "work", box.name)
    try:
        session.expect(b"after\r\nafter\r\n")
        session.type(b"\x04")
        assert session.wait() == 0
    finally:
        session.close()


def test_questions_of_long_ago_are_not_answered_again(manager: RunningManager, box: Sandbox, tmp_path: Path) -> None:
    opened = box.terminals.open(["cat"], title="work")
    with box.terminals.attach(opened.id) as viewer:
        viewer.send(b"where is the cursor? \x1b[6n\r")
        output_until(iter(viewer), b"\x1b[6n\r\n")
    session = Cli(manager, tmp_path).open_terminal("shell", "--session", "work", box.name)
    try:
        # As a terminal does: it answers what it is asked, in the order in which it is.
        session.expect(rb"\x1b\[6n")
        session.expect(rb"\x1b\[5n")
        session.type(b"\x1b[12;1R\x1b[0n")
        session.type(b"typed\r")
        session.expect(b"typed\r\ntyped\r\n")
        session.type(b"\x04")
        assert session.wait() == 0
    finally:
        session.close()
    with box.terminals.attach(opened.id) as viewer:
        assert b"12;1R" not in output_until(iter(viewer), b"typed\r\ntyped\r\n")


@pytest.mark.parametrize("only_stdin", [False, True])
def test_an_exec_that_loses_its_connection_says_so(
    relay: Relay, manager: RunningManager, box: Sandbox, tmp_path: Path, only_stdin: bool
) -> None:
    cli = Cli(manager, tmp_path)
    environment = {**cli.environment, "ATELIER_API_URL": relay.url, "ATELIER_API_KEY": manager.key}
    through = Cli(dataclasses.replace(manager, environment=environment), tmp_path)
    process = through.start("exec", box.name, "cat", stdin=-1)
    process.stdin.write(b"x")
    process.stdin.flush()
    assert process.stdout.read(1) == b"x"
    if only_stdin:
        # What the program writes is still being listened to.
        relay.refused = b"/stdin"
        process.stdin.write(b"y")
        process.stdin.flush()
    else:
        relay.drop()
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said.startswith(b"error: "), b"Traceback" in said) == (125, True, False), said
