"""Carries calls to the manager over HTTP: ``Connection`` blocks, ``AsyncConnection`` runs on asyncio.

Retries only what may be asked twice and got no answer at all (``Call.repeatable``). Ordinary answers have time limits;
streams have none, but TCP keepalive notices a peer that is gone. Redirects are not followed: the key stays here.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, TypeVar
from urllib.request import getproxies

import httpx

from atelier import __version__
from atelier.client.addresses import resolve_target
from atelier.client.call import Call, LineStream
from atelier.client.environment import Endpoint
from atelier.client.errors import error_from_response, error_from_transport
from atelier.client.line_splitter import LineSplitter
from atelier.model.errors import AtelierError, TransientError

T = TypeVar("T")

_CONNECT_SECONDS = 5.0
_RETRY_PAUSES_SECONDS = (0.2, 0.8)
_ERROR_BODY_MAX_BYTES = 256 * 1024
CHUNK_BYTES = 256 * 1024

_LIMITS = httpx.Limits(
    max_connections=100,
    max_keepalive_connections=20,
    keepalive_expiry=2.0,  # less than the server's 5 s, or a request may meet a connection that is just being closed
)
_ALIVE: list[tuple[int, int, int]] = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
        if hasattr(socket, name)
    ),
]


class _Wire:
    """What both connections share: addresses, headers, the reading of failures."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.target = resolve_target(endpoint.api_url)
        self.headers = {"Authorization": f"Bearer {endpoint.api_key}", "User-Agent": f"atelier/{__version__}"}
        if self.target.host_header is not None:
            self.headers["Host"] = self.target.host_header

    @property
    def verify(self) -> ssl.SSLContext | bool:
        # Loading the certificate store takes longer than a whole request, and plain HTTP has no use for it.
        return True if self.target.is_tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    @property
    def uses_proxy(self) -> bool:
        # A proxy for the way out must not be asked for this machine itself.
        return not self.target.is_loopback and bool(getproxies())

    def url(self, path: str) -> str:
        return self.target.base_url + path

    def request_arguments(self, call: Call[Any], content: object) -> dict[str, Any]:
        headers = dict(call.headers)
        if content is None and call.body is not None:
            headers.setdefault("Content-Type", "application/json")
        return {
            "method": call.method,
            "url": self.url(call.path),
            "headers": headers,
            "content": call.body if content is None else content,
            "timeout": httpx.Timeout(call.read_timeout_seconds, connect=_CONNECT_SECONDS, pool=_CONNECT_SECONDS),
        }

    def stream_arguments(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        sent = dict(headers)
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        return {
            "method": method,
            "url": self.url(path),
            "headers": sent,
            "content": body,
            "timeout": httpx.Timeout(None, connect=_CONNECT_SECONDS, pool=_CONNECT_SECONDS),
        }

    def translate(self, error: httpx.HTTPError | httpx.InvalidURL, operation: str) -> AtelierError:
        if isinstance(error, httpx.InvalidURL):
            return error_from_transport(httpx.UnsupportedProtocol(str(error)), self.endpoint.api_url, operation)
        return error_from_transport(error, self.endpoint.api_url, operation)

    @staticmethod
    def broken_line(operation: str) -> TransientError:
        return TransientError(f"could not {operation}: the answer broke off", code="connection_lost")


def _may_retry(call: Call[Any], error: httpx.HTTPError, attempt: int) -> bool:
    """A refused connection is final (nobody is there); a broken one may have met a manager that restarts."""
    broken = isinstance(error, httpx.ReadError | httpx.WriteError | httpx.RemoteProtocolError)
    return call.repeatable and broken and attempt < len(_RETRY_PAUSES_SECONDS)


class Connection:
    """A blocking connection to one manager; safe for several threads. ``transport`` is for tests.

    Every method raises an error of ``model.errors`` and no other.
    """

    def __init__(self, endpoint: Endpoint, *, transport: httpx.BaseTransport | None = None) -> None:
        self._wire = _Wire(endpoint)
        self.endpoint = endpoint
        self._http = httpx.Client(
            headers=self._wire.headers,
            trust_env=self._wire.uses_proxy,
            verify=self._wire.verify,
            limits=_LIMITS,
            transport=transport or self._transport(),
        )

    def _transport(self) -> httpx.BaseTransport | None:
        if self._wire.uses_proxy:
            return None  # only httpx's own transport knows proxies
        return httpx.HTTPTransport(verify=self._wire.verify, trust_env=False, limits=_LIMITS, socket_options=_ALIVE)

    def send(self, call: Call[T], content: Iterable[bytes] | None = None) -> T:
        """Carry out ``call``; ``content`` streams the body."""
        attempt = 0
        while True:
            try:
                response = self._http.request(**self._wire.request_arguments(call, content))
                break
            except httpx.InvalidURL as error:
                raise self._wire.translate(error, call.operation) from error
            except httpx.HTTPError as error:
                if content is not None or not _may_retry(call, error, attempt):
                    raise self._wire.translate(error, call.operation) from error
                time.sleep(_RETRY_PAUSES_SECONDS[attempt])
                attempt += 1
        if response.status_code >= 300:
            raise error_from_response(response.status_code, response.content, call.operation)
        return call.parse(response.status_code, response.content)

    @contextmanager
    def open_stream(
        self,
        operation: str,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Generator[httpx.Response]:
        """The answer's head; the body is the caller's to iterate, inside the context, through ``chunks``."""
        arguments = self._wire.stream_arguments(method, path, body, headers or {})
        try:
            with self._http.stream(**arguments) as response:
                if response.status_code >= 300:
                    content = _first_bytes(response.iter_bytes())
                    raise error_from_response(response.status_code, content, operation)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._wire.translate(error, operation) from error

    def lines(self, stream: LineStream[T]) -> Generator[T]:
        """The parsed lines of an NDJSON answer, as they come. Closing the iterator ends the request."""
        with self.open_stream(stream.operation, stream.method, stream.path, body=stream.body) as response:
            splitter = LineSplitter()
            for chunk in response.iter_bytes():
                for line in splitter.feed(chunk):
                    yield stream.parse(line)
            if splitter.has_rest():
                raise self._wire.broken_line(stream.operation)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncConnection:
    """The same on asyncio; belongs to one event loop."""

    def __init__(self, endpoint: Endpoint, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._wire = _Wire(endpoint)
        self.endpoint = endpoint
        self._http = httpx.AsyncClient(
            headers=self._wire.headers,
            trust_env=self._wire.uses_proxy,
            verify=self._wire.verify,
            limits=_LIMITS,
            transport=transport or self._transport(),
        )

    def _transport(self) -> httpx.AsyncBaseTransport | None:
        if self._wire.uses_proxy:
            return None  # only httpx's own transport knows proxies
        return httpx.AsyncHTTPTransport(
            verify=self._wire.verify, trust_env=False, limits=_LIMITS, socket_options=_ALIVE
        )

    async def send(self, call: Call[T], content: AsyncIterable[bytes] | None = None) -> T:
        """Carry out ``call``; ``content`` streams the body."""
        attempt = 0
        while True:
            try:
                response = await self._http.request(**self._wire.request_arguments(call, content))
                break
            except httpx.InvalidURL as error:
                raise self._wire.translate(error, call.operation) from error
            except httpx.HTTPError as error:
                if content is not None or not _may_retry(call, error, attempt):
                    raise self._wire.translate(error, call.operation) from error
                await asyncio.sleep(_RETRY_PAUSES_SECONDS[attempt])
                attempt += 1
        if response.status_code >= 300:
            raise error_from_response(response.status_code, response.content, call.operation)
        return call.parse(response.status_code, response.content)

    @asynccontextmanager
    async def open_stream(
        self,
        operation: str,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[httpx.Response]:
        arguments = self._wire.stream_arguments(method, path, body, headers or {})
        try:
            async with self._http.stream(**arguments) as response:
                if response.status_code >= 300:
                    content = await _first_bytes_async(response.aiter_bytes())
                    raise error_from_response(response.status_code, content, operation)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._wire.translate(error, operation) from error

    async def lines(self, stream: LineStream[T]) -> AsyncGenerator[T]:
        """The parsed lines of an NDJSON answer, as they come. Closing the iterator ends the request."""
        async with self.open_stream(stream.operation, stream.method, stream.path, body=stream.body) as response:
            splitter = LineSplitter()
            async for chunk in response.aiter_bytes():
                for line in splitter.feed(chunk):
                    yield stream.parse(line)
            if splitter.has_rest():
                raise self._wire.broken_line(stream.operation)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncConnection:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class ConnectionLease:
    """A connection that a caller lent (it stays open), or that is opened on first use and closed with its holder."""

    def __init__(self, endpoint: Endpoint, lent: Connection | None = None) -> None:
        self.endpoint = endpoint
        self._lent = lent
        self._own: Connection | None = None

    @property
    def connection(self) -> Connection:
        if self._lent is not None:
            return self._lent
        if self._own is None:
            self._own = Connection(self.endpoint)
        return self._own

    def another(self) -> ConnectionLease:
        """For another handle: the same connection if it is lent, else one of its own."""
        return ConnectionLease(self.endpoint, self._lent)

    def close(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.close()


class AsyncConnectionLease:
    """The same for asyncio."""

    def __init__(self, endpoint: Endpoint, lent: AsyncConnection | None = None) -> None:
        self.endpoint = endpoint
        self._lent = lent
        self._own: AsyncConnection | None = None

    @property
    def connection(self) -> AsyncConnection:
        if self._lent is not None:
            return self._lent
        if self._own is None:
            self._own = AsyncConnection(self.endpoint)
        return self._own

    def another(self) -> AsyncConnectionLease:
        """For another handle: the same connection if it is lent, else one of its own."""
        return AsyncConnectionLease(self.endpoint, self._lent)

    async def close(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            await own.close()


def _first_bytes(chunks: Iterator[bytes]) -> bytes:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) >= _ERROR_BODY_MAX_BYTES:
            break
    return bytes(content)


async def _first_bytes_async(chunks: AsyncIterator[bytes]) -> bytes:
    content = bytearray()
    async for chunk in chunks:
        content += chunk
        if len(content) >= _ERROR_BODY_MAX_BYTES:
            break
    return bytes(content)
