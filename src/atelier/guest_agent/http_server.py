"""The serving side of the guest agent's HTTP: the keep-alive loop over one connection, heads read, responses sent.

Called by ``program`` for each stream of the guest channel (or, in development, of a loopback listener). A piece of a
streamed response goes out at once; a client that goes away ends the response to it and nothing else.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Final

from atelier.guest_agent.gate import Gate
from atelier.guest_agent.http import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    PLAIN,
    READ_BYTES,
    STREAM,
    UNARY,
    Connection,
    FilePart,
    HttpError,
    Request,
    Response,
    Router,
    json_response,
)
from atelier.guest_agent.local_stream import LocalTransport
from atelier.guest_protocol.connect import (
    CONTENT_TYPE_STREAM,
    ConnectError,
    encode_end_stream,
    error_body,
)

_LINGER_BYTES: Final = 64 * 1024 * 1024
_LINGER_SECONDS: Final = 2.0
_WATCH_AFTER_SECONDS: Final = 0.1
_JOIN_BYTES: Final = 64 * 1024
_REASONS: Final = {
    100: "Continue",
    200: "OK",
    201: "Created",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    499: "Client Closed Request",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
}


class HttpServer:
    """Serves connections. ``authorize`` raises a ConnectError for a request that may not enter a route that is not
    public; None lets all in. While ``gate`` is closed only the routes that are still are served, the others wait."""

    def __init__(
        self, router: Router, authorize: Callable[[Request], None] | None = None, gate: Gate | None = None
    ) -> None:
        self._router = router
        self._authorize = authorize
        self._gate = gate

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other until the client closes; then close ``writer``."""
        connection = Connection(reader, writer)
        try:
            while await self._serve_one(connection):
                pass
        except ConnectionError:
            pass  # the client is gone: nobody is left to be told
        finally:
            writer.close()

    async def _serve_one(self, connection: Connection) -> bool:
        """False: the connection is to be closed."""
        try:
            head = await _read_head(connection)
            if head is None:
                return False
            request, keep_alive = _parse_head(head, connection)
        except HttpError as error:
            await _send(connection, _error_response(error, PLAIN), keep_alive=False)
            await _linger(connection)
            return False
        form = PLAIN
        try:
            route = self._router.get(request.method, request.path)
            form = route.form
            if self._authorize is not None and not route.is_public:
                self._authorize(request)
            if not route.is_still:
                connection.gate = self._gate
                await _enter(connection)
            response = await route.endpoint(request)
        except ConnectError as error:
            response = _error_response(error, form)
        except ConnectionError:
            raise
        except Exception as error:
            _print_exception(request)
            response = _error_response(ConnectError("internal", f"{type(error).__name__}: {error}"), form)
        try:
            is_aligned = not connection.is_broken and await request.discard_rest()
        except HttpError:
            is_aligned = False
        keep_alive = keep_alive and is_aligned
        await _send(connection, response, keep_alive=keep_alive)
        connection.gate = None
        if not is_aligned:
            await _linger(connection)
        return keep_alive


async def _enter(connection: Connection) -> None:
    """Wait until the connection's gate is open. Raises ConnectionResetError when the client has gone meanwhile: in a
    machine that was restored, nobody of before is to be served."""
    if connection.gate is not None and not connection.gate.is_open:
        await connection.gate.opened()
        if connection.writer.transport.is_closing() or connection.reader.at_eof():
            raise ConnectionResetError("the client went away while the guest stood still")


async def _read_head(connection: Connection) -> bytes | None:
    """The request line and the headers; None when the client closed between two requests."""
    buffer = connection.buffer
    searched = 0
    while True:
        if searched == 0 and buffer.startswith(b"\r\n"):
            del buffer[:2]  # RFC 9112 2.2: an empty line before a request is skipped
            continue
        end = buffer.find(b"\r\n\r\n", searched)
        if 0 <= end <= MAX_HEAD_BYTES:
            head = bytes(buffer[:end])
            del buffer[: end + 4]
            return head
        if len(buffer) > MAX_HEAD_BYTES:
            raise HttpError(431, "resource_exhausted", f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        searched = max(0, len(buffer) - 3)
        if not await connection.fill():
            if buffer:
                raise ConnectionResetError("the client went away inside a request's headers")
            return None


def _parse_head(head: bytes, connection: Connection) -> tuple[Request, bool]:
    """The request, and whether the connection may be kept. Raises HttpError."""
    lines = head.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not parts[0].isalpha() or not parts[1].startswith("/"):
        raise HttpError(400, "invalid_argument", "the request line is malformed")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise HttpError(505, "unimplemented", "HTTP/1.1 is spoken here")
    if len(lines) > MAX_HEADERS + 1:
        raise HttpError(431, "resource_exhausted", f"more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name.strip(" \t\n\r\0") != name or "\n" in value or "\r" in value or "\0" in value:
            raise HttpError(400, "invalid_argument", "a header is malformed")
        name = name.lower()
        value = value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    body_bytes = _body_bytes(headers)
    connection.owes_continue = (
        body_bytes != 0 and headers.get("expect", "").lower() == "100-continue" and not connection.buffer
    )
    wish = headers.get("connection", "").lower()
    keep_alive = "close" not in wish if version == "HTTP/1.1" else "keep-alive" in wish
    path, _, raw_query = target.partition("?")
    return Request(method, path, raw_query, headers, connection, body_bytes), keep_alive


def _body_bytes(headers: dict[str, str]) -> int:
    """The body's length, -1 if it is chunked. What two readers could take in two ways is refused."""
    length = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise HttpError(400, "invalid_argument", "the body's length is ambiguous")
        return -1
    if length is None:
        return 0
    if not length.isascii() or not length.isdigit() or len(length) > 15:
        raise HttpError(400, "invalid_argument", "the content-length is no number")
    return int(length)


async def _send(connection: Connection, response: Response, *, keep_alive: bool) -> None:
    writer = connection.writer
    body = response.body
    head = [f"HTTP/1.1 {response.status} {_REASONS.get(response.status, 'Status')}"]
    counted = False
    for name, value in response.headers.items():
        counted = counted or name.lower() == "content-length"
        head.append(f"{name}: {value}")
    chunked = False
    if isinstance(body, bytes):
        if not counted and response.status not in (204, 304):
            head.append(f"content-length: {len(body)}")
    elif not counted:
        chunked = True
        head.append("transfer-encoding: chunked")
    if not keep_alive:
        head.append("connection: close")
    raw_head = "\r\n".join(head).encode("latin-1") + b"\r\n\r\n"
    if isinstance(body, bytes):
        if len(body) <= _JOIN_BYTES:
            writer.write(raw_head + body)
        else:
            writer.write(raw_head)
            writer.write(body)
        await writer.drain()
        return
    writer.write(raw_head)
    if isinstance(body, FilePart):
        try:
            await _while_watched(connection, _send_file(writer, body))
        finally:
            if connection.gate is not None:
                # Closing a file that was removed meanwhile writes to its file system.
                await connection.gate.opened()
            body.file.close()
        return
    try:
        await _while_watched(connection, _send_pieces(writer, body, chunked))
    finally:
        close = getattr(body, "aclose", None)
        if close is not None:
            await close()


async def _linger(connection: Connection) -> None:
    """Let a client that still sends find the answer: closing a socket with unread bytes in it would destroy both."""
    if connection.writer.can_write_eof():
        connection.writer.write_eof()
    left = _LINGER_BYTES
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0:
                left -= len(await connection.read_some(READ_BYTES))
    except TimeoutError:
        pass


async def _send_file(writer: asyncio.StreamWriter, part: FilePart) -> None:
    transport = writer.transport
    if isinstance(transport, LocalTransport):
        await transport.send_file(part.file.fileno(), part.first, part.length)
        return
    sent = await asyncio.get_running_loop().sendfile(transport, part.file, part.first, part.length)
    if sent < part.length:
        raise ConnectionAbortedError("the file became shorter while it was read")


async def _send_pieces(writer: asyncio.StreamWriter, body: AsyncIterator[bytes | memoryview], chunked: bool) -> None:
    """Each as it comes."""
    async for piece in body:
        size = len(piece)
        if not size:
            continue
        if not chunked:
            writer.write(piece)
        elif size <= _JOIN_BYTES:
            writer.write(b"%x\r\n%b\r\n" % (size, piece))
        else:
            writer.write(b"%x\r\n" % size)
            writer.write(piece)
            writer.write(b"\r\n")
        await writer.drain()
    if chunked:
        writer.write(b"0\r\n\r\n")
    await writer.drain()


async def _while_watched(connection: Connection, sending: Coroutine[None, None, None]) -> None:
    """Send a long body. A client that goes away meanwhile ends it with ConnectionResetError."""
    serving = asyncio.current_task()
    assert serving is not None
    watch = _ClientWatch(connection, serving)
    try:
        await sending
    except asyncio.CancelledError:
        if watch.client_is_gone and serving.uncancel() == 0:
            raise ConnectionResetError("the client went away") from None
        raise
    except ConnectionError:
        raise
    except Exception:
        # The status line is long gone: only a broken connection can still tell the client.
        _print_exception(None)
        connection.writer.transport.abort()
        raise ConnectionResetError("the response broke off") from None
    finally:
        await watch.stop()


class _ClientWatch:
    """While a response is streamed nobody reads the connection, so nobody would see a client go. This does, and
    cancels the serving task then. It starts late: most streams have ended before."""

    __slots__ = ("_connection", "_serving", "_timer", "_watching", "client_is_gone")

    def __init__(self, connection: Connection, serving: asyncio.Task[object]) -> None:
        self._connection = connection
        self._serving = serving
        self._watching: asyncio.Task[None] | None = None
        self.client_is_gone = False
        self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_SECONDS, self._start)

    async def stop(self) -> None:
        self._timer.cancel()
        if self._watching is not None and not self._watching.done():
            # Cancelling a StreamReader.read() loses nothing: it takes bytes only when it returns. But it must be out
            # of it before the next request is read.
            self._watching.cancel()
            await asyncio.wait((self._watching,))

    def _start(self) -> None:
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        connection = self._connection
        try:
            while len(connection.buffer) <= MAX_HEAD_BYTES:
                if not await connection.fill():
                    break
            else:
                return  # a client that pipelines this much is alive; the socket's own buffer holds the rest
        except ConnectionError:
            pass
        self.client_is_gone = True
        self._serving.cancel()


def _error_response(error: ConnectError, form: int) -> Response:
    if form == STREAM:
        return Response(200, {"content-type": CONTENT_TYPE_STREAM}, encode_end_stream(error))
    if form == UNARY:
        return json_response(error_body(error), error.status)
    return json_response({"code": error.status, "message": error.message}, error.status)


def _print_exception(request: Request | None) -> None:
    import traceback

    where = f"{request.method} {request.path}" if request is not None else "a streamed response"
    print(f"guest agent: {where} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
