"""A small HTTP/1.1 server: requests, responses, routes, the keep-alive loop over one connection.

Called by the guest agent's ``__main__`` (streams of the guest channel, or a loopback listener in development); the
services register their handlers on the Router. It knows nothing of processes, files or users. Every length is
bounded, a body is read only when a handler asks for it, and a piece of a streamed response goes out at once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final

from atelier.guest_protocol.connect import (
    CONTENT_TYPE_STREAM,
    CONTENT_TYPE_UNARY,
    ConnectError,
    encode_end_stream,
    encode_json,
    error_body,
)

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_HEADERS: Final = 100

_MAX_CHUNK_LINE_BYTES: Final = 256
_READ_BYTES: Final = 256 * 1024
_DRAIN_BYTES: Final = 256 * 1024
"""What a handler left unread of a body is thrown away up to this; beyond it the connection is closed."""
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
_CODE_OF_STATUS: Final = {404: "not_found", 405: "unimplemented", 413: "resource_exhausted", 501: "unimplemented"}


class HttpError(ConnectError):
    """Ends a request with ``status``. A plain route answers ``{"code": status, "message"}`` as E2B does, a Connect
    route ``{"code": code, "message"}``; a ConnectError raised by a handler does the same, its status by its code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(code, message)
        self._status = status

    @property
    def status(self) -> int:
        return self._status


class Request:
    """One request. ``headers`` have lower-case names; repeated ones are joined by ", ". ``path`` is as sent."""

    __slots__ = ("_connection", "_query", "_raw_query", "_remaining", "headers", "method", "path")

    def __init__(
        self, method: str, path: str, raw_query: str, headers: dict[str, str], connection: Connection, body_bytes: int
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self._raw_query = raw_query
        self._query: dict[str, list[bytes]] | None = None
        self._connection = connection
        self._remaining = body_bytes
        """Bytes of the body still to come; -1: chunked, the end is not seen yet."""

    @property
    def query(self) -> dict[str, list[bytes]]:
        """The query's parameters, values percent-decoded to bytes: a file's name need not be UTF-8."""
        if self._query is None:
            self._query = _parse_query(self._raw_query)
        return self._query

    def query_value(self, name: str) -> bytes | None:
        """The parameter's first value, or None if it is absent."""
        values = self.query.get(name)
        return values[0] if values else None

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises HttpError 413 if it is longer than ``limit`` bytes."""
        if self._remaining > limit:
            raise _too_large(limit)
        if self._remaining == 0:
            return b""
        buffer = self._connection.buffer
        if 0 < self._remaining <= len(buffer):
            body = bytes(buffer[: self._remaining])
            del buffer[: self._remaining]
            self._remaining = 0
            return body
        gathered = bytearray()
        async for piece in self.iterate():
            gathered += piece
            if len(gathered) > limit:
                raise _too_large(limit)
        return bytes(gathered)

    async def iterate(self) -> AsyncIterator[bytes | memoryview]:
        """The body's pieces as they come, at most 256 KiB each. Raises ConnectionError when it breaks off."""
        connection = self._connection
        if self._remaining < 0:
            async for piece in self._iterate_chunks():
                yield piece
            return
        while self._remaining > 0:
            piece = await connection.read_some(min(self._remaining, _READ_BYTES))
            self._remaining -= len(piece)
            yield piece

    async def _iterate_chunks(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while True:
            line = await connection.read_line(_MAX_CHUNK_LINE_BYTES)
            digits = line.partition(b";")[0].strip()
            if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
                connection.is_broken = True
                raise HttpError(400, "invalid_argument", "a chunk's size is no hexadecimal number")
            size = int(digits, 16)
            if size == 0:
                break
            while size:
                piece = await connection.read_some(min(size, _READ_BYTES))
                size -= len(piece)
                yield piece
            if await connection.read_line(2) != b"":
                connection.is_broken = True
                raise HttpError(400, "invalid_argument", "a chunk is longer than its size says")
        for _ in range(MAX_HEADERS):  # trailers are read and dropped
            if await connection.read_line(MAX_HEAD_BYTES) == b"":
                self._remaining = 0
                return
        connection.is_broken = True
        raise HttpError(431, "invalid_argument", "too many trailers")

    async def discard_rest(self) -> bool:
        """Throw away what is left of the body. False: there is too much of it, the connection must be closed."""
        dropped = 0
        if self._remaining > _DRAIN_BYTES or (self._remaining and self._connection.owes_continue):
            return False
        if self._remaining:
            async for piece in self.iterate():
                dropped += len(piece)
                if dropped > _DRAIN_BYTES:
                    return False
        return True


class Response:
    """``body`` is bytes, or an async iterator of pieces: sent with the ``content-length`` among ``headers`` if there
    is one, else chunked. An iterator that is an async generator is closed when the client goes away."""

    __slots__ = ("body", "headers", "status")

    def __init__(
        self,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        body: bytes | AsyncIterator[bytes | memoryview] = b"",
    ) -> None:
        self.status = status
        self.headers = headers or {}
        self.body = body


def json_response(message: object, status: int = 200) -> Response:
    return Response(status, {"content-type": CONTENT_TYPE_UNARY}, encode_json(message))


Endpoint = Callable[[Request], Awaitable[Response]]

PLAIN: Final = 0
UNARY: Final = 1
STREAM: Final = 2


class Route:
    """One endpoint. ``form`` (PLAIN, UNARY, STREAM) is how its errors are written; ``is_public``: no token is asked."""

    __slots__ = ("endpoint", "form", "is_public")

    def __init__(self, endpoint: Endpoint, form: int, is_public: bool) -> None:
        self.endpoint = endpoint
        self.form = form
        self.is_public = is_public


class Router:
    """Exact paths to endpoints. With ``is_public`` the endpoint itself asks for a token or a signature."""

    def __init__(self) -> None:
        self._routes: dict[str, dict[str, Route]] = {}
        self._later: list[Callable[[], None]] = []

    def add(self, method: str, path: str, endpoint: Endpoint, *, is_public: bool = False, form: int = PLAIN) -> None:
        routes = self._routes.setdefault(path, {})
        if method in routes:
            raise ValueError(f"{method} {path} has an endpoint already")
        routes[method] = Route(endpoint, form, is_public)

    def register_later(self, register: Callable[[], None]) -> None:
        """``register`` adds routes (and imports what they need) at ``load_rest``, or when an unknown path is asked for."""
        self._later.append(register)

    def load_rest(self) -> None:
        """Add the routes that are still missing."""
        while self._later:
            self._later.pop()()

    def get(self, method: str, path: str) -> Route:
        """Raises HttpError 404 for an unknown path, 405 for a method that it does not have."""
        routes = self._routes.get(path)
        if routes is None and self._later:
            self.load_rest()
            routes = self._routes.get(path)
        if routes is None:
            raise HttpError(404, "not_found", f"no such path: {path[:200]}")
        route = routes.get(method)
        if route is None:
            raise HttpError(405, "unimplemented", f"{path} takes {', '.join(sorted(routes))}, not {method[:20]}")
        return route


class Connection:
    """What has been read of a connection and not been used yet, and the way to more."""

    __slots__ = ("buffer", "is_broken", "owes_continue", "reader", "writer")

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = bytearray()
        self.owes_continue = False
        self.is_broken = False
        """The framing of the request is lost: nothing more may be read as a request."""

    async def fill(self) -> bool:
        """Wait for more bytes; False at the end of the stream."""
        if self.owes_continue:
            self.owes_continue = False
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = await self.reader.read(_READ_BYTES)
        self.buffer += data
        return bool(data)

    async def read_some(self, limit: int) -> bytes:
        buffer = self.buffer
        if buffer:
            with memoryview(buffer) as view:  # a slice of the buffer itself would be copied twice
                piece = bytes(view[:limit])
            del buffer[: len(piece)]
            return piece
        if self.owes_continue:
            self.owes_continue = False
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        piece = await self.reader.read(limit)
        if not piece:
            raise ConnectionResetError("the client went away inside a request's body")
        return piece

    async def read_line(self, limit: int) -> bytes:
        """One line without its CRLF (a bare LF is taken too). Raises HttpError 400 if it is longer than ``limit``."""
        if not self.buffer and not self.owes_continue:
            # The way of large bodies in chunks: what follows the line stays in the reader and is copied once less.
            try:
                line = await self.reader.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                raise ConnectionResetError("the client went away inside a request's body") from None
            except asyncio.LimitOverrunError:
                line = bytes(limit + 3)
            if len(line) <= limit + 2:
                return line[:-1].removesuffix(b"\r")
            self.is_broken = True
            raise HttpError(400, "invalid_argument", f"a line in the body is longer than {limit} bytes")
        while True:
            end = self.buffer.find(b"\n", 0, limit + 2)
            if end >= 0:
                line = bytes(self.buffer[:end])
                del self.buffer[: end + 1]
                return line.removesuffix(b"\r")
            if len(self.buffer) > limit + 1:
                self.is_broken = True
                raise HttpError(400, "invalid_argument", f"a line in the body is longer than {limit} bytes")
            if not await self.fill():
                raise ConnectionResetError("the client went away inside a request's body")


class HttpServer:
    """Serves connections. ``authorize`` raises a ConnectError for a request that may not enter a route that is not
    public; None lets all in."""

    def __init__(self, router: Router, authorize: Callable[[Request], None] | None = None) -> None:
        self._router = router
        self._authorize = authorize

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
        if not is_aligned:
            await _linger(connection)
        return keep_alive


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
    await _stream(connection, body, chunked)


async def _linger(connection: Connection) -> None:
    """Let a client that still sends find the answer: closing a socket with unread bytes in it would destroy both."""
    if connection.writer.can_write_eof():
        connection.writer.write_eof()
    left = _LINGER_BYTES
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0:
                left -= len(await connection.read_some(_READ_BYTES))
    except TimeoutError:
        pass


async def _stream(connection: Connection, body: AsyncIterator[bytes | memoryview], chunked: bool) -> None:
    """Send the pieces as they come. A client that goes away meanwhile ends it with ConnectionResetError."""
    writer = connection.writer
    serving = asyncio.current_task()
    assert serving is not None
    watch = _ClientWatch(connection, serving)
    try:
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
    except asyncio.CancelledError:
        if watch.client_is_gone and serving.uncancel() == 0:
            raise ConnectionResetError("the client went away") from None
        raise
    except ConnectionError:
        raise
    except Exception:
        # The status line is long gone: only a broken connection can still tell the client.
        _print_exception(None)
        writer.transport.abort()
        raise ConnectionResetError("the response broke off") from None
    finally:
        await watch.stop()
        close = getattr(body, "aclose", None)
        if close is not None:
            await close()


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


def _too_large(limit: int) -> HttpError:
    return HttpError(413, "resource_exhausted", f"the body is longer than {limit} bytes")


def _print_exception(request: Request | None) -> None:
    import traceback

    where = f"{request.method} {request.path}" if request is not None else "a streamed response"
    print(f"guest agent: {where} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def _parse_query(raw: str) -> dict[str, list[bytes]]:
    query: dict[str, list[bytes]] = {}
    for pair in raw.split("&"):
        if pair:
            name, _, value = pair.partition("=")
            query.setdefault(percent_decode(name).decode("utf-8", "replace"), []).append(percent_decode(value))
    return query


def percent_decode(text: str) -> bytes:
    """A query's name or value in bytes: ``%41`` and ``+`` decoded, a stray ``%`` kept."""
    raw = text.encode("latin-1").replace(b"+", b" ")
    if b"%" not in raw:
        return raw
    first, *pieces = raw.split(b"%")
    decoded = bytearray(first)
    for piece in pieces:
        digits = piece[:2]
        if len(digits) == 2 and not digits.strip(b"0123456789abcdefABCDEF"):
            decoded.append(int(digits, 16))
            decoded += piece[2:]
        else:
            decoded += b"%" + piece
    return bytes(decoded)
