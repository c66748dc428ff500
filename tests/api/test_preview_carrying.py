"""What goes between visitors and sandboxes through the real gateway, and what hostile ones on either side come to."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests.footprint import gateway_pid
from tests.preview_stage import Browser, PreviewStage, Serving
from tests.running_manager import wait_until
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.sync.client import connect

from atelier.gateway.preview_exchange import WEB_SOCKETS_PER_SANDBOX


@pytest.fixture(scope="module")
def box(stage: PreviewStage) -> str:
    return stage.create()


@pytest.fixture
def url(stage: PreviewStage, box: str) -> str:
    return stage.share(box, 8000)


def answering(*pieces: bytes) -> Serving:
    """A server that reads one head, says these pieces and ends."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return serve


def get(url: str, *lines: str) -> bytes:
    return "\r\n".join(["GET / HTTP/1.1", f"Host: {urlsplit(url).netloc}", *lines, "", ""]).encode()


def served(stage: PreviewStage, box: str, port: int, server: Serving) -> str:
    stage.channels.servers[port] = server
    return stage.share(box, port)


def test_forged_headers_and_our_cookies_reach_no_sandbox(url: str) -> None:
    sent = [
        ("X-Atelier-Sandbox", "x"), ("x-atelier-port", "1"), ("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-Host", "e"),
        ("X-Forwarded-Proto", "https"), ("X-Forwarded-Anything", "x"), ("Forwarded", "for=6.6.6.6"), ("X-Real-IP", "6"),
        ("Authorization", "Bearer the-sandboxes-own"),
        ("Cookie", "a=1; __Host-atelier=s; atelier_session=s;__host-ATELIER-preview=p; atelier-preview=p; b=2"),
    ]  # fmt: skip
    got = Browser().ask("GET", url, headers=dict(sent)).json()["headers"]
    seen = {name.lower(): value for name, value in got}
    assert seen["cookie"] == "a=1; b=2"
    assert seen["authorization"] == "Bearer the-sandboxes-own"
    assert seen["host"] == seen["x-forwarded-host"] == urlsplit(url).netloc
    assert (seen["x-forwarded-for"], seen["x-forwarded-proto"]) == ("127.0.0.1", "http")
    assert not {"forwarded", "x-real-ip", "x-forwarded-anything", "x-atelier-sandbox", "x-atelier-port"} & set(seen)
    assert len(got) == len(seen), "nothing is said twice"


def test_a_hostile_sandbox_sets_no_cookie_of_ours(stage: PreviewStage, box: str) -> None:
    ours = ("__Host-atelier", "__host-atelier-preview", "atelier_session", "ATELIER-PREVIEW", "atelier_session_return")
    lines = b"".join(b"Set-Cookie: %b=evil; Path=/; Domain=localhost\r\n" % name.encode() for name in ours)
    url = served(
        stage,
        box,
        8001,
        answering(
            b'HTTP/1.1 200 OK\r\nClear-Site-Data: "cookies"\r\nX-Atelier-Upstream: /x\r\nSet-Cookie: own=good\r\n'
            + lines
            + b"Set-Cookie:  atelier_session =evil\r\nContent-Length: 2\r\n\r\nok"
        ),
    )
    answer = Browser().ask("GET", url)
    assert answer.text == "ok"
    assert answer.headers.get_list("set-cookie") == ["own=good"]
    assert not {"clear-site-data", "x-atelier-upstream"} & set(answer.headers)


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"\x00" * 100_000,
    ],
)
def test_nonsense_from_a_sandbox_is_a_page(stage: PreviewStage, box: str, answer: bytes) -> None:
    url = served(stage, box, 8002, answering(answer))
    told = stage.raw(url, get(url, "Connection: close"))
    while told.startswith(b"HTTP/1.1 100 "):
        told = told.partition(b"\r\n\r\n")[2]
    assert told.startswith(b"HTTP/1.1 502 "), told[:100]
    assert b"gave no good answer" in told
    assert told.count(b"HTTP/1.1 5") == 1


@pytest.mark.parametrize(
    "body",
    [b"5\r\nhel", b"5\r\nhello!\r\n0\r\n\r\n", b"x\r\nhello\r\n0\r\n\r\n", b"5\nhello\r\n0\r\n\r\n", b"f" * 17 + b"\r\n", b"0\r\n" + b"A: b\r\n" * 100],
)  # fmt: skip
def test_an_answer_that_breaks_off_does_not_look_whole(stage: PreviewStage, box: str, body: bytes) -> None:
    url = served(stage, box, 8003, answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body))
    with pytest.raises(httpx.RemoteProtocolError):
        Browser().ask("GET", url)


def test_what_is_no_request_is_refused_and_the_connection_ends(stage: PreviewStage, url: str) -> None:
    host = urlsplit(url).netloc.encode()
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
    for status, head in (
        (b"400", b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nHost: evil"),
        (b"400", b"POST / HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 4\r\nTransfer-Encoding: chunked"),
        (b"400", b"POST / HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 4\r\nContent-Length: 90"),
        (b"501", b"POST / HTTP/1.1\r\nHost: " + host + b"\r\nTransfer-Encoding: xchunked"),
        (b"400", b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nX: y\r\n folded"),
        (b"400", b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nX: a\nSet-Cookie: b"),
        (b"400", b"GET http://evil/ HTTP/1.1\r\nHost: " + host),
        (b"431", b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nX: " + b"a" * 40_000),
        (b"431", b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nX: " + b"a" * 1_000_000),
        (b"431", b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nX: y" * 1 + b"\r\nX: y" * 200),
        (b"400", b"CONNECT evil:80 HTTP/1.1\r\nHost: " + host),
        (b"400", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ):
        try:
            told = stage.raw(url, head + b"\r\n\r\n" + smuggled)
        except ConnectionResetError:
            # More was on its way than anybody reads: the answer may be lost with it.
            assert len(head) > 500_000
            continue
        assert told.startswith(b"HTTP/1.1 " + status), (head[:80], told[:80])
        assert told.count(b"HTTP/1.1 ") == 1, "what came behind it was no request"


def test_requests_one_after_the_other_on_one_connection(stage: PreviewStage, url: str) -> None:
    told = stage.raw(url, get(url).replace(b"GET / ", b"GET /a ") * 3 + get(url, "Connection: close"))
    assert told.count(b"HTTP/1.1 200 OK") == 4
    old = stage.raw(url, get(url).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"HTTP/1.0" in old
    assert old.startswith(b"HTTP/1.1 200")


def test_a_chunked_upload_arrives_chunked_without_what_was_hidden_in_it(stage: PreviewStage, box: str) -> None:
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        got.append(head + await reader.readuntil(b"0\r\n\r\n"))
        writer.write(b"HTTP/1.1 201 Made\r\nContent-Length: 0\r\n\r\n")

    url = served(stage, box, 8004, serve)
    request = b"POST / HTTP/1.1\r\nHost: %b\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    body = b'5;ext="x"\r\nhello\r\n00a\r\n0123456789\r\n0\r\nX-Trailer: y\r\n\r\n'
    told = stage.raw(url, request % urlsplit(url).netloc.encode() + body)
    assert told.startswith(b"HTTP/1.1 201 Made")
    assert got[0].partition(b"\r\n\r\n")[2] == b"5\r\nhello\r\na\r\n0123456789\r\n0\r\n\r\n"
    for broken in (b"5\r\nhello!\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n"):
        told = stage.raw(url, request % urlsplit(url).netloc.encode() + broken)
        assert not told.startswith(b"HTTP/1.1 2"), broken
    assert len(got) == 1


def test_large_bodies_both_ways_gather_nowhere(stage: PreviewStage, box: str) -> None:
    size = 200_000_000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        digest, left = hashlib.sha256(), size
        while left:
            piece = await reader.read(min(left, 2**20))
            digest.update(piece)
            left -= len(piece)
        said = digest.hexdigest().encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size + len(said), said))
        for _ in range(size // 1_000_000):
            writer.write(bytes(1_000_000))
            await writer.drain()

    url = served(stage, box, 8005, serve)
    piece = bytes(range(250)) * 4000
    expected = hashlib.sha256(piece * (size // len(piece))).hexdigest()

    def content() -> Iterator[bytes]:
        for _ in range(size // len(piece)):
            yield piece

    parts = urlsplit(url)
    headers = {"Host": parts.netloc, "Content-Length": str(size)}
    with httpx.Client(timeout=120) as client, client.stream(
        "POST", f"http://127.0.0.1:{parts.port}/", content=content(), headers=headers
    ) as answer:  # fmt: skip
        received = 0
        first = b""
        for each in answer.iter_raw():
            first = (first + each)[:64]
            received += len(each)
    assert first.decode() == expected
    assert received == size + 64
    assert gateway_peak_mib(stage) < 200


def gateway_peak_mib(stage: PreviewStage) -> float:
    status = Path(f"/proc/{gateway_pid(stage.manager)}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def test_events_come_at_once_and_end_with_the_visitor(stage: PreviewStage, box: str) -> None:
    ended = threading.Event()
    going = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"b\r\ndata: one\n\n\r\n")
        await going.wait()
        writer.write(b"b\r\ndata: two\n\n\r\n")
        # It says nothing more, and waits for its visitor to go.
        assert await reader.read(1) == b""
        ended.set()

    url = served(stage, box, 8006, serve)
    parts = urlsplit(url)
    with socket.create_connection(("127.0.0.1", parts.port or 0), timeout=30) as visitor:
        visitor.sendall(get(url))
        seen = b""
        while b"data: one" not in seen:
            seen += visitor.recv(65536)
        assert b"data: two" not in seen
        stage.channels._loop.call_soon_threadsafe(going.set)
        while b"data: two" not in seen:
            seen += visitor.recv(65536)
        assert not ended.is_set()
    assert ended.wait(20)


def test_an_answer_before_the_body_and_one_to_wait_for(stage: PreviewStage, box: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/refused" in head:
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
            return
        assert b"Expect: 100-continue" in head
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(5)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + body)

    url = served(stage, box, 8007, serve)
    host = urlsplit(url).netloc.encode()
    head = b"POST /%b HTTP/1.1\r\nHost: " + host + b"\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=30) as visitor:
        visitor.sendall(head % b"fine")
        assert visitor.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        visitor.sendall(b"hello")
        told = b""
        while b"hello" not in told:
            told += visitor.recv(1000)
        assert told.startswith(b"HTTP/1.1 200 OK")
    refused = stage.raw(url, head % b"refused")
    assert refused.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in refused, "its body is still to come"


async def web_socket_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A WebSocket server by the library that is also the client's; its connection is the channel's."""
    protocol = ServerProtocol()
    while piece := await reader.read(65536):
        protocol.receive_data(piece)
        for event in protocol.events_received():
            if isinstance(event, Request):
                protocol.send_response(protocol.accept(event))
            elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                protocol.send_text(event.data)
        for out in protocol.data_to_send():
            writer.write(out)
        await writer.drain()
        if protocol.close_expected():
            return


@contextlib.contextmanager
def web_socket(url: str, **options: object):
    parts = urlsplit(url)
    connected = socket.create_connection(("127.0.0.1", parts.port or 0), timeout=30)
    with connect(f"ws://{parts.netloc}/", sock=connected, **options) as opened:  # type: ignore[arg-type]
        yield opened


def test_web_sockets_and_how_many(stage: PreviewStage, box: str) -> None:
    url = served(stage, box, 8008, web_socket_echo)
    with web_socket(url) as one:
        for size in (1, 200, 70_000):
            one.send("x" * size)
            assert one.recv(timeout=30) == "x" * size
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(web_socket(url)) for _ in range(WEB_SOCKETS_PER_SANDBOX)]
        told = stage.raw(
            url,
            get(url, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: " + "A" * 22 + "==",
                "Sec-WebSocket-Version: 13"),
            until=b"</html>",
        )  # fmt: skip
        assert told.startswith(b"HTTP/1.1 503 ")
        assert b"too_many_visitors" in told
        # Another sandbox has room of its own.
        other = stage.share(stage.create(), 8008)
        with web_socket(other) as elsewhere:
            elsewhere.send("there")
            assert elsewhere.recv(timeout=30) == "there"
        opened[0].send("still")
        assert opened[0].recv(timeout=30) == "still"

    def is_free() -> bool:
        with contextlib.suppress(Exception), web_socket(url):
            return True
        return False

    wait_until(is_free, 30)


def test_a_server_that_ends_a_kept_connection_costs_nobody_an_error(stage: PreviewStage, box: str) -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")  # and ends, without an answer to the second

    url = served(stage, box, 8009, serve)
    browser = Browser()
    assert [browser.ask("GET", url).text for _ in range(6)] == ["ok"] * 6
    assert connections == 6
    assert [browser.ask("POST", url).status_code for _ in range(3)] == [200] * 3


def test_visitors_without_end_who_send_slowly_keep_nobody_out(stage: PreviewStage, url: str) -> None:
    port = urlsplit(url).port or 0
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            slow.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert Browser().ask("GET", url).status_code == 200
