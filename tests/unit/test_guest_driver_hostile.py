"""A guest that is out to harm: whatever it sends, the guest driver ends with an error in words and little memory."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from atelier.drivers.guest import agent as driver_module
from atelier.drivers.guest import guest_http
from atelier.drivers.guest.agent import AgentGuests
from atelier.model.errors import AtelierError, GuestError, GuestProtocolError, GuestUnreachableError, NotFoundError
from atelier.model.guest import ProcessSpec

BOX = "abcdefghijkl"
ENTRY = {"name": "f", "type": "FILE_TYPE_FILE", "path": "/f", "size": "1", "mode": 420}


class Hostile:
    """Answers each request with ``answer``; ``forever`` is then repeated until the driver has had enough."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer = b""
        self.forever = b""
        self.requests = 0
        self.sent = 0
        self.driver = AgentGuests(lambda _: folder / "c.sock", folder / "g.sock")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await reader.readline() != b"CONNECT 49983\n":
                return
            writer.write(b"OK 1\n")
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            writer.write(self.answer)
            await writer.drain()
            while self.forever:
                writer.write(self.forever)
                self.sent += len(self.forever)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def json(self, value: object, status: int = 200) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.answer = b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)

    def stream(self, body: bytes, content_type: str = "application/connect+json") -> None:
        self.answer = f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n\r\n".encode() + body


@pytest.fixture
async def hostile(tmp_path: Path) -> AsyncIterator[Hostile]:
    hostile = Hostile(tmp_path)
    server = await asyncio.start_unix_server(hostile.serve, str(tmp_path / "c.sock"))
    yield hostile
    await hostile.driver.close()
    server.close()


async def stat(driver: AgentGuests) -> object:
    return await driver.stat(BOX, b"/f")


async def listing(driver: AgentGuests) -> object:
    return await driver.list_directory(BOX, b"/")


async def clock(driver: AgentGuests) -> object:
    return await driver.synchronize_clock(BOX)


async def reading(driver: AgentGuests) -> object:
    async with driver.read_file(BOX, b"/f", offset=1, length=3) as (_, chunks):
        return [chunk async for chunk in chunks]


async def reading_all(driver: AgentGuests) -> object:
    async with driver.read_file(BOX, b"/f") as (_, chunks):
        return [chunk async for chunk in chunks]


async def archive(driver: AgentGuests) -> object:
    async with driver.read_archive(BOX, b"/f") as chunks:
        return [chunk async for chunk in chunks]


async def running(driver: AgentGuests) -> object:
    async with driver.start_process(BOX, ProcessSpec(("x",))) as events:
        return [event async for event in events]


async def processes(driver: AgentGuests) -> object:
    return await driver.list_processes(BOX)


async def metrics(driver: AgentGuests) -> object:
    return await driver.metrics(BOX)


Call = Callable[[AgentGuests], Awaitable[object]]


async def failure(hostile: Hostile, call: Call) -> AtelierError:
    with pytest.raises(AtelierError) as caught:
        async with asyncio.timeout(60):
            await call(hostile.driver)
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()
    return caught.value


def envelope(value: object, flags: int = 0) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return bytes([flags]) + len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize("told", ["1e9", "x", "-1", True, 1.5, 2**63, "9223372036854775808", "9" * 5000, [], {}])
async def test_clocks_that_are_no_number(hostile: Hostile, told: object) -> None:
    hostile.json({"timeNs": told})
    assert isinstance(await failure(hostile, clock), GuestProtocolError)
    assert hostile.requests == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel",
    ],
)
async def test_a_connection_that_ends_early(hostile: Hostile, answer: bytes) -> None:
    hostile.answer = answer
    assert isinstance(await failure(hostile, stat), GuestUnreachableError)
    # A question may be asked twice, not more.
    assert hostile.requests == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"no http at all\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZZ\r\n",
        b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"A" * 300_000 + b"\r\n\r\n",
    ],
)
async def test_broken_http(hostile: Hostile, answer: bytes) -> None:
    hostile.answer = answer
    assert isinstance(await failure(hostile, stat), GuestProtocolError)
    assert hostile.requests == 1


@pytest.mark.parametrize(
    ("answer", "forever"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 10_000),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65_536),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b"[" * 65_536 + b"\r\n"),
        (b"HTTP/1.1 500 No\r\n\r\n", b"x" * 65_536),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n", b"x" * 65_536),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;", b"x" * 65_536),
    ],
)
@pytest.mark.parametrize("call", [stat, listing, metrics, clock])
async def test_endless_answers(hostile: Hostile, call: Call, answer: bytes, forever: bytes) -> None:
    hostile.answer, hostile.forever = answer, forever
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(await failure(hostile, call), GuestProtocolError)
    assert hostile.sent < 16 * 1024 * 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


async def test_endless_preliminary_answers(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.forever = b"HTTP/1.1 100 Continue\r\n\r\n" * 1000
    monkeypatch.setattr(guest_http, "ANSWER_SECONDS", 0.5)
    monkeypatch.setitem(guest_http.GuestHttp.ask.__kwdefaults__, "answer_seconds", 0.5)
    monkeypatch.setitem(guest_http.GuestHttp.open.__wrapped__.__kwdefaults__, "answer_seconds", 0.5)
    for call in (stat, running, reading_all):
        assert isinstance(await failure(hostile, call), AtelierError)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"nonsense",
        b'{"entry": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"entry": ' + b"[" * 1_000_000,
        b'{"entry": {"size": ' + b"9" * 100_000 + b"}}",
        b'{"entry": NaN}',
        b'{"entry": "\xff"}',
    ],
)
async def test_broken_json(hostile: Hostile, body: bytes) -> None:
    hostile.json(body)
    assert isinstance(await failure(hostile, stat), GuestProtocolError)


@pytest.mark.parametrize(
    "change",
    [
        {"path": "relative"},
        {"path": "/a\0b"},
        {"path": 5},
        {"path": "/\ud800"},
        {"pathBytes": "!"},
        {"size": "-1"},
        {"size": "many"},
        {"size": 2**70},
        {"mode": -1},
        {"mode": True},
        {"name": ["f"]},
        {"modifiedTime": "yesterday"},
        {"owner": {"x": "y"}},
    ],
)
async def test_entries_that_are_none(hostile: Hostile, change: dict[str, object]) -> None:
    hostile.json({"entry": {**ENTRY, **change}})
    assert isinstance(await failure(hostile, stat), GuestProtocolError)


async def test_an_entry_of_the_bare_minimum(hostile: Hostile) -> None:
    hostile.json({"entry": {"path": "/f", "mode": 0o100644, "modifiedTime": "2024-01-02T03:04:05.123456789Z"}})
    entry = await hostile.driver.stat(BOX, b"/f")
    assert (entry.size_bytes, entry.mode, entry.modified_at.microsecond) == (0, 0o644, 123456)


@pytest.mark.parametrize("path", ["/a/../../etc/passwd", "/..", "/a/./b", "//a", "/a/"])
async def test_listed_paths_that_lead_elsewhere(hostile: Hostile, path: str) -> None:
    hostile.json({"entries": [{**ENTRY, "path": path}]})
    assert isinstance(await failure(hostile, listing), GuestProtocolError)


async def test_a_listing_without_end(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_LIST_MAX_ENTRIES", 50)
    hostile.json({"entries": [ENTRY] * 20, "nextPage": "x"})
    assert (await failure(hostile, listing)).code == "listing_too_large"
    monkeypatch.setattr(driver_module, "_LIST_MAX_PAGES", 5)
    hostile.json({"entries": [], "nextPage": "x"})
    hostile.requests = 0
    assert (await failure(hostile, listing)).code == "listing_too_large"
    assert hostile.requests == 5


@pytest.mark.parametrize(
    "content_range", ["", "bytes 0-2/10", "bytes 1-4/10", "bytes 1-3/2", "bytes 3-1/10", "bytes 1-3/*", "x" * 1000]
)
async def test_another_range_than_asked_for(hostile: Hostile, content_range: str) -> None:
    hostile.answer = f"HTTP/1.1 206 P\r\ncontent-length: 3\r\ncontent-range: {content_range}\r\n\r\nabc".encode()
    assert isinstance(await failure(hostile, reading), GuestProtocolError)


@pytest.mark.parametrize("body", [b"2\r\nab\r\n0\r\n\r\n", b"4\r\nabcd\r\n0\r\n\r\n"])
async def test_another_length_than_promised(hostile: Hostile, body: bytes) -> None:
    hostile.answer = b"HTTP/1.1 206 P\r\ntransfer-encoding: chunked\r\ncontent-range: bytes 1-3/10\r\n\r\n" + body
    assert isinstance(await failure(hostile, reading), GuestProtocolError)


async def test_a_file_comes_in_large_pieces_of_bounded_size(hostile: Hostile) -> None:
    content = bytes(range(256)) * 8192
    hostile.json(content)
    pieces: list[bytes] = []
    async with hostile.driver.read_file(BOX, b"/f") as (_, chunks):
        async for chunk in chunks:
            pieces.append(chunk)
            # A reader slower than the guest: what has come meanwhile is waiting.
            await asyncio.sleep(0.01)
    assert b"".join(pieces) == content
    assert 64 * 1024 < max(len(piece) for piece in pieces) <= 256 * 1024


async def test_a_slow_reader_holds_the_guest_up(hostile: Hostile) -> None:
    hostile.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n"
    hostile.forever = bytes(65536)
    async with hostile.driver.read_file(BOX, b"/f") as (_, chunks):
        await anext(aiter(chunks))
        sent = -1
        async with asyncio.timeout(60):
            while sent != hostile.sent:
                sent = hostile.sent
                await asyncio.sleep(0.3)
        assert sent < 4 * 1024 * 1024


async def test_the_driver_works_on_the_loop_that_the_manager_runs_on(tmp_path: Path) -> None:
    def in_uvloop() -> None:
        import uvloop

        async def main() -> None:
            hostile = Hostile(tmp_path)
            server = await asyncio.start_unix_server(hostile.serve, str(tmp_path / "u.sock"))
            driver = AgentGuests(lambda _: tmp_path / "u.sock", tmp_path / "g.sock")
            hostile.json({"entry": ENTRY})
            await driver.stat(BOX, b"/f")
            await driver.close()
            server.close()

        uvloop.run(main())

    await asyncio.to_thread(in_uvloop)


async def test_a_file_without_a_length(hostile: Hostile) -> None:
    hostile.answer = b"HTTP/1.1 200 OK\r\n\r\nabc"
    assert isinstance(await failure(hostile, reading_all), GuestProtocolError)
    hostile.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc"
    assert isinstance(await failure(hostile, reading_all), GuestUnreachableError)


async def test_an_archive_that_is_cut_off(hostile: Hostile) -> None:
    hostile.answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
    assert isinstance(await failure(hostile, archive), GuestUnreachableError)


START = envelope({"event": {"start": {"pid": 7}}})
END = envelope({"event": {"end": {"exitCode": 0, "status": "exit status 0"}}})


@pytest.mark.parametrize(
    "body",
    [
        b"\0\xff\xff\xff\xff",
        b"\0\x00\x40\x00\x01",
        b"\x01\0\0\0\0",
        b"\x80\0\0\0\0",
        envelope(b"[]"),
        envelope(b"x"),
        envelope({"event": []}),
        envelope({"event": {"start": {"pid": 0}}}),
        envelope({"event": {"start": {"pid": -1}}}),
        envelope({"event": {"start": 5}}),
        START + envelope({"event": {"data": {"stdout": "!"}}}),
        START + envelope({"event": {"data": {"stdout": 5}}}),
        START + envelope({"event": {"end": {"exitCode": 10_000}}}),
        START + envelope({"event": {"end": {"exitCode": "x"}}}),
        START + envelope({"event": {"end": {"signal": 65}}}),
        START + envelope({}, 2),
        START + END + END,
    ],
)
async def test_broken_streams(hostile: Hostile, body: bytes) -> None:
    hostile.stream(body)
    assert isinstance(await failure(hostile, running), GuestProtocolError)


async def test_a_stream_that_is_none(hostile: Hostile) -> None:
    hostile.stream(START + END + envelope({}, 2), "text/html")
    assert isinstance(await failure(hostile, running), GuestProtocolError)
    hostile.stream(START)
    assert isinstance(await failure(hostile, running), GuestUnreachableError)
    hostile.stream(START + envelope({"event": {"keepalive": {}}}) + envelope({"x": 1}) + END + envelope({}, 2))
    assert len(await running(hostile.driver)) == 2  # type: ignore[arg-type]


async def test_endless_output_is_not_gathered(hostile: Hostile) -> None:
    hostile.stream(START)
    hostile.forever = envelope({"event": {"data": {"stdout": "A" * 40_000}}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with hostile.driver.start_process(BOX, ProcessSpec(("yes",))) as events:
        await anext(events)
        await anext(events)
        # A reader that reads no more stops the guest.
        sent = -1
        while sent != hostile.sent:
            sent = hostile.sent
            await asyncio.sleep(0.1)
    assert hostile.sent < 16 * 1024 * 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("kind", ["events", "chunks"])
async def test_tiny_pieces_leave_the_loop_to_others(hostile: Hostile, kind: str) -> None:
    """Thousands of them come with one read; while they are taken, everybody else must be served."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    if kind == "events":
        hostile.stream(START)
        hostile.forever = envelope({"event": {"data": {"stdout": "eA=="}}}) * 5000
    else:
        hostile.answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        hostile.forever = b"1\r\nx\r\n" * 40_000
    taken = 0
    serving_others = asyncio.create_task(others())
    try:
        if kind == "events":
            async with hostile.driver.start_process(BOX, ProcessSpec(("yes",))) as events:
                async for _ in events:
                    taken += 1
                    if taken == 20_000:
                        break
        else:
            async with hostile.driver.read_archive(BOX, b"/f") as chunks:
                async for _ in chunks:
                    taken += 1
                    if taken == 20_000:
                        break
    finally:
        serving_others.cancel()
    assert turns > taken / 100


async def test_words_of_a_guest_are_made_harmless(hostile: Hostile) -> None:
    hostile.json({"code": "not_found", "message": "\x1b[2J\x07evil\nline" + "x" * 10_000}, 404)
    error = await failure(hostile, stat)
    assert isinstance(error, NotFoundError)
    assert error.message.startswith("[2J evil line")
    hostile.json({"code": ["not_found"], "message": {"x": 1}}, 418)
    assert isinstance(await failure(hostile, stat), GuestError)


async def test_numbers_out_of_range(hostile: Hostile) -> None:
    for message in ({"cpu_used_pct": 101}, {"cpu_used_pct": "x"}, {"mem_total": -1}, {"cpu_count": 10**9}):
        hostile.json(message)
        assert isinstance(await failure(hostile, metrics), GuestProtocolError)
    for message in ({"processes": {}}, {"processes": [5]}, {"processes": [{"pid": 1, "config": {"args": "x"}}]}):
        hostile.json(message)
        assert isinstance(await failure(hostile, processes), GuestProtocolError)


@pytest.mark.parametrize("answer", [b"", b"ERROR unreachable\n", b"OK", b"x" * 1_000_000, b"OK 1"])
async def test_a_channel_that_does_not_open(tmp_path: Path, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    server = await asyncio.start_unix_server(serve, str(tmp_path / "c.sock"))
    driver = AgentGuests(lambda _: tmp_path / "c.sock", tmp_path / "g.sock")
    with pytest.raises(GuestUnreachableError):
        await driver.stat(BOX, b"/")
    await driver.close()
    server.close()
