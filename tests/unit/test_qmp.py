"""The control socket's protocol, against a server that behaves and one that does not."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from atelier.drivers.vmm.qmp import QmpConnection
from atelier.model.errors import VmmError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
OK = b'{"return": {}}\r\n'

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="atelier-qmp-") as folder:
        yield Path(folder) / "qmp"


@asynccontextmanager
async def _server(path: Path, serve: Serve) -> AsyncIterator[None]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(handle, path)
    async with server:
        yield


def _answers(*answers: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readline()
        writer.write(OK)
        for answer in answers:
            await reader.readline()
            writer.write(answer)
        await reader.read()

    return serve


async def test_commands_and_answers(path: Path) -> None:
    event = b'{"event": "RESUME", "timestamp": {}}\r\n'
    answers = _answers(event + b'{"return": {"status": "running"}}\r\n' + event, event + b'{"return": [1, 2]}\r\n')
    async with _server(path, answers), await QmpConnection.open(path) as connection:
        assert await connection.query("query-status") == {"status": "running"}
        assert await connection.execute("query-list") == [1, 2]


async def test_a_refusal_carries_qemus_words(path: Path) -> None:
    refusal = b'{"error": {"class": "GenericError", "desc": "no such device"}}\r\n'
    async with _server(path, _answers(refusal, OK)), await QmpConnection.open(path) as connection:
        with pytest.raises(VmmError, match="refused device_del: no such device"):
            await connection.execute("device_del", {"id": "x"})
        assert await connection.query("query-status") == {}


async def test_several_tasks_ask_in_turn_and_what_was_given_up_is_answered_to_nobody(path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        late: list[bytes] = []
        while line := await reader.readline():
            asked = json.loads(line)
            answer = json.dumps({"return": {"asked": asked["execute"]}, "id": asked["id"]}).encode() + b"\r\n"
            if asked["execute"] == "slow":
                late.append(answer)
                continue
            writer.write(b"".join([*late, answer]))
            late.clear()

    async with _server(path, serve), await QmpConnection.open(path) as connection:
        given_up = asyncio.create_task(connection.query("slow"))
        await asyncio.sleep(0.05)
        given_up.cancel()
        answers = await asyncio.gather(*(connection.query(f"query-{number}") for number in range(5)))
        assert answers == [{"asked": f"query-{number}"} for number in range(5)]


async def test_nothing_listens(path: Path) -> None:
    with pytest.raises(VmmError, match="does not listen"):
        await QmpConnection.open(path)


async def test_a_vmm_that_dies(path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        return

    async with _server(path, hang_up):
        with pytest.raises(VmmError, match="closed its control socket"):
            await QmpConnection.open(path)


async def test_a_vmm_that_is_silent(path: Path) -> None:
    async def stay_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with _server(path, stay_silent):
        with pytest.raises(VmmError, match="did not greet"):
            await QmpConnection.open(path, timeout_seconds=0.1)
    path.unlink(missing_ok=True)
    async with _server(path, _answers()), await QmpConnection.open(path, timeout_seconds=0.1) as connection:
        with pytest.raises(VmmError, match="did not answer query-status"):
            await connection.execute("query-status")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"x" * 3_000_000, "a line of more than"),
        (b"{]\n", "no JSON"),
        (b"[1]\n", "no JSON object"),
        (b"[" * 200_000 + b"\n", "no JSON"),
        (b"\xff\xfe\n", "no JSON"),
        (b'{"event": "X"}\n' * 20_000, "no answer"),
        (b'{"error": 3}\n', "no reason given"),
    ],
)
async def test_a_hostile_vmm_is_bounded(path: Path, bad: bytes, words: str) -> None:
    async with _server(path, _answers(bad)), await QmpConnection.open(path) as connection:
        with pytest.raises(VmmError, match=words):
            await connection.execute("query-status")


async def test_descriptors_travel_with_a_command(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("what it holds")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> tuple[dict[str, object], str]:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(GREETING)
            connection.recv(1000)
            connection.sendall(OK)
            message, descriptors, _, _ = socket.recv_fds(connection, 1000, 4)
            connection.sendall(OK)
            (received,) = descriptors
            with os.fdopen(received) as file:
                return json.loads(message), file.read()

    serving = asyncio.create_task(asyncio.to_thread(serve))
    with (tmp_path / "file").open() as file:
        async with await QmpConnection.open(path) as connection:
            await connection.execute("getfd", {"fdname": "state"}, descriptors=[file.fileno()])
    asked = {"execute": "getfd", "arguments": {"fdname": "state"}, "id": 2}
    assert await serving == (asked, "what it holds")
    listener.close()
