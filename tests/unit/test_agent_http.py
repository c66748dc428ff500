"""The guest agent's HTTP server, spoken to byte by byte: what it answers, and what it does with hostile clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from atelier.guest_agent.http import (
    MAX_HEAD_BYTES,
    HttpError,
    Request,
    Response,
    Router,
    json_response,
    percent_decode,
)
from atelier.guest_agent.http_server import HttpServer
from atelier.guest_agent.rpc import Message, add_client_stream, add_server_stream, add_unary
from atelier.guest_agent.state import AgentState
from atelier.guest_protocol.connect import (
    ConnectError,
    EnvelopeReader,
    decode_json,
    encode_end_stream,
    encode_envelope,
)


class Recorder:
    """What the endpoints saw."""

    def __init__(self) -> None:
        self.streams_closed = 0
        self.release = asyncio.Event()


def routes(recorder: Recorder) -> Router:
    router = Router()

    async def echo(request: Request) -> Response:
        return Response(200, {"content-type": "application/octet-stream"}, await request.read(1024 * 1024))

    async def ignore(request: Request) -> Response:
        return json_response({"query": {name: [repr(v) for v in values] for name, values in request.query.items()}})

    async def count(request: Request) -> Response:
        total = 0
        async for piece in request.iterate():
            total += len(piece)
        return json_response({"total": total})

    async def fail(request: Request) -> Response:
        raise HttpError(507, "resource_exhausted", "the disk is full")

    async def crash(request: Request) -> Response:
        raise RuntimeError("a mistake")

    async def drip(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                yield b"first"
                await recorder.release.wait()
                yield b"x" * 100_000
            finally:
                recorder.streams_closed += 1

        return Response(200, {}, pieces())

    async def break_off(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"first"
            raise RuntimeError("a mistake in the middle")

        return Response(200, {}, pieces())

    async def sized(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes | memoryview]:
            yield b"abc"
            yield memoryview(b"defg")

        return Response(200, {"content-length": "7"}, pieces())

    async def double(message: Message, request: Request) -> Message:
        if "number" not in message:
            raise ConnectError("not_found", "no number")
        return {"number": message["number"] * 2}

    async def numbers(message: Message, request: Request) -> AsyncGenerator[Message | bytes, None]:
        for number in range(message["count"]):
            yield {"number": number}
        if message.get("fail"):
            raise ConnectError("aborted", "as you wish")

    async def add(messages: AsyncIterator[Message], request: Request) -> Message:
        return {"sum": sum([message["number"] async for message in messages])}

    router.add("POST", "/echo", echo)
    router.add("GET", "/ignore", ignore)
    router.add("POST", "/ignore", ignore)
    router.add("POST", "/count", count)
    router.add("GET", "/fail", fail)
    router.add("GET", "/crash", crash)
    router.add("GET", "/drip", drip)
    router.add("GET", "/break", break_off)
    router.add("GET", "/sized", sized)
    router.add("GET", "/open", ignore, is_public=True)
    add_unary(router, "/test.Test/Double", double)
    add_server_stream(router, "/test.Test/Numbers", numbers)
    add_client_stream(router, "/test.Test/Add", add)
    return router


class Client:
    """A raw connection to a server of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, recorder: Recorder) -> None:
        self.reader = reader
        self.writer = writer
        self.recorder = recorder

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)
        first, *lines = raw.decode().strip().split("\r\n")
        return int(first.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}

    async def chunk(self) -> bytes:
        size = int(await asyncio.wait_for(self.reader.readline(), 20), 16)
        return (await asyncio.wait_for(self.reader.readexactly(size + 2), 20))[:-2]

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while piece := await self.chunk():
                body += piece
            return status, headers, body
        body = await asyncio.wait_for(self.reader.readexactly(int(headers.get("content-length", "0"))), 20)
        return status, headers, body

    async def is_closed(self) -> bool:
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), 20) == b""
        return True


@pytest.fixture
async def connect(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[object]:
    recorder = Recorder()
    state = AgentState()
    server = HttpServer(routes(recorder), state.authorize)
    path = str(tmp_path_factory.mktemp("http") / "s")
    listener = await asyncio.start_unix_server(server.serve, path)
    clients: list[Client] = []

    async def open_client(token: str = "") -> Client:
        state.set_token(token)
        client = Client(*await asyncio.open_unix_connection(path, limit=1 << 20), recorder)
        clients.append(client)
        return client

    yield open_client
    for client in clients:
        client.writer.close()
    listener.close()
    await listener.wait_closed()


def get(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: guest\r\n{headers}\r\n".encode()


def post(path: str, body: bytes, content_type: str = "application/json", headers: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: guest\r\nContent-Type: {content_type}\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def test_requests_follow_each_other_on_one_connection(connect) -> None:
    client = await connect()
    for body in (b"one", b"", b"x" * 500_000):
        client.send(post("/echo", body))
        assert (await client.answer())[::2] == (200, body)


async def test_requests_sent_ahead_are_answered_in_their_order(connect) -> None:
    client = await connect()
    client.send(b"".join(post("/echo", str(number).encode()) for number in range(20)))
    assert [(await client.answer())[2] for _ in range(20)] == [str(number).encode() for number in range(20)]


async def test_a_request_may_come_byte_by_byte(connect) -> None:
    client = await connect()
    for byte in post("/echo", b"slow"):
        client.send(bytes((byte,)))
        await asyncio.sleep(0)
    assert (await client.answer())[2] == b"slow"


async def test_a_chunked_body_is_put_together(connect) -> None:
    client = await connect()
    head = b"POST /echo HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n"
    client.send(head + b"3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: t\r\n\r\n")
    assert (await client.answer())[2] == b"abc0123456789"
    client.send(get("/ignore"))
    assert (await client.answer())[0] == 200


async def test_continue_is_said_only_to_who_waits_and_is_read(connect) -> None:
    client = await connect()
    client.send(b"POST /echo HTTP/1.1\r\nHost: g\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
    assert (await client.head())[0] == 100
    client.send(b"body")
    assert (await client.answer())[2] == b"body"
    client.send(b"POST /nowhere HTTP/1.1\r\nHost: g\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
    status, headers, _ = await client.answer()
    assert (status, headers["connection"]) == (404, "close")


async def test_an_unread_body_is_passed_over_if_short_and_ends_the_connection_if_long(connect) -> None:
    client = await connect()
    client.send(post("/ignore", b"x" * 1000) + get("/ignore"))
    assert (await client.answer())[0] == 200
    assert (await client.answer())[0] == 200
    client.send(post("/ignore", b"x" * 2_000_000))
    status, headers, _ = await client.answer()
    assert (status, headers["connection"]) == (200, "close")


async def test_the_query_is_bytes(connect) -> None:
    client = await connect()
    client.send(get("/ignore?path=/tmp/%FF%00a+b&path=2&empty=&flag&bad=%zz%4"))
    query = json.loads((await client.answer())[2])["query"]
    assert query == {
        "path": [repr(b"/tmp/\xff\0a b"), repr(b"2")],
        "empty": [repr(b"")],
        "flag": [repr(b"")],
        "bad": [repr(b"%zz%4")],
    }
    assert percent_decode("%e2%82%ac") == "€".encode()


async def test_errors_have_e2b_s_form_on_plain_routes_and_connect_s_on_procedures(connect) -> None:
    client = await connect()
    client.send(get("/fail"))
    status, _, body = await client.answer()
    assert (status, json.loads(body)) == (507, {"code": 507, "message": "the disk is full"})
    client.send(get("/nowhere"))
    assert json.loads((await client.answer())[2])["code"] == 404
    client.send(get("/echo"))
    assert json.loads((await client.answer())[2])["code"] == 405
    client.send(post("/test.Test/Double", b"{}"))
    status, _, body = await client.answer()
    assert (status, json.loads(body)) == (404, {"code": "not_found", "message": "no number"})
    client.send(post("/test.Test/Double", b'{"number":21}'))
    assert json.loads((await client.answer())[2]) == {"number": 42}
    client.send(get("/crash"))
    status, _, body = await client.answer()
    assert (status, "a mistake" in json.loads(body)["message"]) == (500, True)


async def test_the_token_is_asked_for_where_the_route_is_not_public(connect) -> None:
    client = await connect(token="secret")
    for headers, status in (("", 401), ("X-Access-Token: wrong\r\n", 401), ("X-Access-Token: secret\r\n", 200)):
        client.send(get("/ignore", headers))
        assert (await client.answer())[0] == status
    client.send(get("/open"))
    assert (await client.answer())[0] == 200
    client.send(post("/test.Test/Double", b'{"number":1}'))
    assert json.loads((await client.answer())[2])["code"] == "unauthenticated"


async def test_a_stream_s_head_and_first_piece_do_not_wait_for_the_second(connect) -> None:
    client = await connect()
    client.send(get("/drip"))
    status, headers = await client.head()
    assert (status, headers["transfer-encoding"]) == (200, "chunked")
    assert await client.chunk() == b"first"
    client.recorder.release.set()
    assert len(await client.chunk()) == 100_000
    assert await client.chunk() == b""
    client.send(get("/sized"))
    assert (await client.answer())[2] == b"abcdefg"


async def test_a_request_sent_while_a_stream_runs_is_answered_after_it(connect) -> None:
    client = await connect()
    client.send(get("/drip"))
    await client.head()
    await client.chunk()
    await asyncio.sleep(0.2)  # the server watches the connection by now
    client.send(post("/echo", b"early"))
    await asyncio.sleep(0.05)
    client.recorder.release.set()
    await client.chunk()
    await client.chunk()
    assert (await client.answer())[2] == b"early"


async def test_a_client_that_goes_away_ends_its_stream(connect) -> None:
    client = await connect()
    client.send(get("/drip"))
    await client.head()
    client.writer.close()
    async with asyncio.timeout(20):
        while not client.recorder.streams_closed:
            await asyncio.sleep(0.02)


async def test_a_stream_that_breaks_off_breaks_the_connection(connect) -> None:
    client = await connect()
    client.send(get("/break"))
    await client.head()
    assert await client.chunk() == b"first"
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError, ValueError)):
        await client.chunk()


async def test_procedures_stream_both_ways(connect) -> None:
    client = await connect()
    client.send(post("/test.Test/Numbers", encode_envelope(b'{"count":3}'), "application/connect+json"))
    status, _, body = await client.answer()
    frames = list(EnvelopeReader().feed(body))
    assert status == 200
    assert [decode_json(payload) for flags, payload in frames if not flags] == [{"number": n} for n in range(3)]
    assert frames[-1] == (2, b"{}")
    client.send(post("/test.Test/Numbers", encode_envelope(b'{"count":1,"fail":true}'), "application/connect+json"))
    body = (await client.answer())[2]
    assert decode_json(list(EnvelopeReader().feed(body))[-1][1])["error"]["code"] == "aborted"
    numbers = b"".join(encode_envelope(b'{"number":%d}' % number) for number in range(10))
    client.send(post("/test.Test/Add", numbers, "application/connect+json"))
    body = (await client.answer())[2]
    assert next(iter(EnvelopeReader().feed(body))) == (0, b'{"sum":45}')


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0\xff\xff\xff\xff",
        encode_envelope(b"{}", 1),
        encode_envelope(b"{}") * 2,
        encode_envelope(b"[" * 100_000),
        encode_envelope(b"{}")[:-1],
        encode_end_stream()[:-2],
    ],
)
async def test_hostile_envelopes_end_their_call_only(connect, body: bytes) -> None:
    client = await connect()
    client.send(post("/test.Test/Numbers", body, "application/connect+json"))
    status, _, answer = await client.answer()
    frames = list(EnvelopeReader().feed(answer))
    assert status == 200
    assert "error" in decode_json(frames[-1][1])
    client.send(get("/ignore"))
    assert (await client.answer())[0] == 200


async def test_another_content_type_is_refused(connect) -> None:
    client = await connect()
    client.send(post("/test.Test/Double", b"{}", "application/proto"))
    assert (await client.answer())[0] == 415


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n\r\n", 400),
        (b"GET http://guest/ HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nname : value\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n folded: value\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\na: b\nc: d\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\na: b\0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 1_0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n", 431),
        (b"POST /count HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
        (b"POST /count HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x10\r\n", 400),
        (b"POST /count HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 16 + b"\r\n", 400),
        (b"POST /count HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 1000, 400),
        (b"POST /count HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n", 400),
        (b"POST /count HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    ],
)
async def test_malformed_requests_are_answered_and_the_connection_closed(connect, raw: bytes, status: int) -> None:
    client = await connect()
    client.send(raw)
    answered, headers, body = await client.answer()
    assert (answered, headers["connection"], json.loads(body)["code"]) == (status, "close", status)
    client.writer.write_eof()
    assert await client.is_closed()


async def test_endless_headers_are_cut_off(connect) -> None:
    client = await connect()
    client.send(b"GET / HTTP/1.1\r\n")
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            client.send(b"x-more: " + b"y" * 1000 + b"\r\n")
            await client.writer.drain()
            if client.reader._buffer:  # pyright: ignore
                break
    assert (await client.answer())[0] == 431


async def test_a_body_that_breaks_off_ends_quietly(connect) -> None:
    client = await connect()
    client.send(b"POST /count HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")
    client.writer.write_eof()
    assert await client.is_closed()
