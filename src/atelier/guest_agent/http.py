"""HTTP as the guest agent's services see it: requests, responses, routes, the connection that bodies are read from.

The services register their handlers on the Router; ``http_server`` serves it. It knows nothing of processes, files or users. Every length is
bounded, a body is read only when a handler asks for it, and a piece of a streamed response goes out at once.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, NamedTuple, TypeVar

from atelier.guest_agent.direct_reader import BodyIntake, DirectReader, Take
from atelier.guest_agent.gate import Gate
from atelier.guest_protocol.connect import (
    CONTENT_TYPE_UNARY,
    ConnectError,
    encode_json,
)

_T = TypeVar("_T")

MAX_HEAD_BYTES: Final = 16 * 1024
MAX_HEADERS: Final = 100

_MAX_CHUNK_LINE_BYTES: Final = 256
READ_BYTES: Final = 256 * 1024
_DRAIN_BYTES: Final = 256 * 1024
"""What a handler left unread of a body is thrown away up to this; beyond it the connection is closed."""

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
            piece = await connection.read_some(min(self._remaining, READ_BYTES))
            self._remaining -= len(piece)
            yield piece

    async def pour(self, take: Take) -> None:
        """Hand the whole body to ``take``, piece by piece as it comes and with as few copies as the connection allows.
        A piece is valid only until ``take`` returns, and ``take`` must not wait.

        Raises what ``take`` raises, ConnectError for a broken body, ConnectionError when it breaks off; the connection
        is closed after the answer then.
        """
        try:
            await self._connection.pour(BodyIntake(take, self._remaining))
        except BaseException:
            self._connection.is_broken = True
            raise
        self._remaining = 0

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
                piece = await connection.read_some(min(size, READ_BYTES))
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


class FilePart(NamedTuple):
    """``length`` bytes of a regular file from ``first`` on."""

    file: io.FileIO
    first: int
    length: int


class Response:
    """``body`` is bytes, an async iterator of pieces, or a part of a file: sent with the ``content-length`` among
    ``headers`` (a file's part needs one), the iterator chunked if there is none. An iterator that is an async generator
    and a file are closed when they have been sent or the client goes away."""

    __slots__ = ("body", "headers", "status")

    def __init__(
        self,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        body: bytes | AsyncIterator[bytes | memoryview] | FilePart = b"",
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
    """One endpoint. ``form`` (PLAIN, UNARY, STREAM) is how its errors are written; ``is_public``: no token is asked;
    ``is_still``: it writes to no disk and starts nothing, so it is served while the guest is quiesced, too."""

    __slots__ = ("endpoint", "form", "is_public", "is_still")

    def __init__(self, endpoint: Endpoint, form: int, is_public: bool, is_still: bool) -> None:
        self.endpoint = endpoint
        self.form = form
        self.is_public = is_public
        self.is_still = is_still


class Router:
    """Exact paths to endpoints. With ``is_public`` the endpoint itself asks for a token or a signature."""

    def __init__(self) -> None:
        self._routes: dict[str, dict[str, Route]] = {}
        self._later: list[Callable[[], None]] = []

    def add(
        self,
        method: str,
        path: str,
        endpoint: Endpoint,
        *,
        is_public: bool = False,
        is_still: bool = False,
        form: int = PLAIN,
    ) -> None:
        routes = self._routes.setdefault(path, {})
        if method in routes:
            raise ValueError(f"{method} {path} has an endpoint already")
        routes[method] = Route(endpoint, form, is_public, is_still)

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

    __slots__ = ("buffer", "gate", "is_broken", "owes_continue", "reader", "writer")

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = bytearray()
        self.gate: Gate | None = None
        """Set while a request is served that must keep still while it is closed: its body waits there, its end too."""
        self.owes_continue = False
        self.is_broken = False
        """The framing of the request is lost: nothing more may be read as a request."""

    async def fill(self) -> bool:
        """Wait for more bytes; False at the end of the stream."""
        if self.owes_continue:
            self.owes_continue = False
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = await self._gated(self.reader.read(READ_BYTES))
        self.buffer += data
        return bool(data)

    async def _gated(self, reading: Awaitable[_T]) -> _T:
        """What ``reading`` gives or raises, but not before the gate is open."""
        try:
            return await reading
        finally:
            if self.gate is not None and not self.gate.is_open:
                await self.gate.opened()

    async def pour(self, intake: BodyIntake) -> None:
        if self.owes_continue:
            self.owes_continue = False
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.buffer:
            with memoryview(self.buffer) as view:
                used = intake.feed(view)
            del self.buffer[:used]
        if isinstance(self.reader, DirectReader):
            await self._gated(self.reader.pour(intake, self.gate))
            return
        while not intake.is_complete:
            piece = await self._gated(self.reader.read(READ_BYTES))
            if not piece:
                raise ConnectionResetError("the client went away inside a request's body")
            used = intake.feed(memoryview(piece))
            self.buffer += piece[used:]

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
        piece = await self._gated(self.reader.read(limit))
        if not piece:
            raise ConnectionResetError("the client went away inside a request's body")
        return piece

    async def read_line(self, limit: int) -> bytes:
        """One line without its CRLF (a bare LF is taken too). Raises HttpError 400 if it is longer than ``limit``."""
        if not self.buffer and not self.owes_continue:
            # The way of large bodies in chunks: what follows the line stays in the reader and is copied once less.
            try:
                line = await self._gated(self.reader.readuntil(b"\n"))
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


def _too_large(limit: int) -> HttpError:
    return HttpError(413, "resource_exhausted", f"the body is longer than {limit} bytes")


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
