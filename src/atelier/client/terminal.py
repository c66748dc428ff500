"""A terminal (PTY) in a sandbox over a WebSocket: for the CLI's ``shell`` and for programs that need a terminal.

Made by ``sandbox.open_terminal`` and ``sandbox.terminals.attach``. Binary frames are the terminal's bytes; text frames are
JSON, told apart here. Closing a terminal's connection leaves its program running.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from websockets.asyncio.client import ClientConnection as AsyncSocket
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection as Socket
from websockets.sync.client import connect

from atelier import __version__
from atelier.client.addresses import resolve_target
from atelier.client.call import TerminalSocket
from atelier.client.environment import Endpoint
from atelier.client.errors import error_from_response, manager_unreachable
from atelier.model.errors import AtelierError, TransientError
from atelier.model.guest import ProcessEnded, ProcessOutput, TerminalSize

_OPEN_SECONDS = 15.0
_FRAME_MAX_BYTES = 16 * 1024 * 1024
E = TypeVar("E")
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class _Address:
    url: str
    options: dict[str, Any]


def _address(endpoint: Endpoint, path: str) -> _Address:
    target = resolve_target(endpoint.api_url)
    options: dict[str, Any] = {
        "additional_headers": {"Authorization": f"Bearer {endpoint.api_key}"},
        "user_agent_header": f"atelier/{__version__}",
        "open_timeout": _OPEN_SECONDS,
        "max_size": _FRAME_MAX_BYTES,
        "compression": None,
    }
    if target.is_loopback:
        # The name stays in the URL (and so in the Host header); the way leads to this machine, past any proxy.
        options |= {"host": target.connect_host, "port": target.port, "proxy": None}
    return _Address("ws" + endpoint.api_url.removeprefix("http") + path, options)


def _with_socket(options: dict[str, Any]) -> dict[str, Any]:
    """The blocking client takes a connected socket where the other takes host and port."""
    rest = {name: value for name, value in options.items() if name not in ("host", "port")}
    if "host" in options:
        rest["sock"] = sock = socket.create_connection((options["host"], options["port"]), _OPEN_SECONDS)
        sock.settimeout(None)  # the limit was for connecting; a terminal may be quiet for hours
    return rest


def _refused(endpoint: Endpoint, operation: str, error: Exception) -> AtelierError:
    if isinstance(error, InvalidStatus):
        # A WebSocket that is refused before it opens says no more than its status.
        status = 401 if error.response.status_code == 403 else error.response.status_code
        found = error_from_response(status, bytes(error.response.body or b""), operation)
        if status == 401 and found.code == "unexpected_answer":
            return type(found)(
                f"could not {operation}: the manager refused the key",
                code="unauthenticated",
                hint="check ATELIER_API_KEY, or the local token file",
            )
        return found
    if isinstance(error, OSError | TimeoutError):
        return manager_unreachable(endpoint.api_url, operation, str(error) or type(error).__name__)
    return TransientError(f"could not {operation}: {error}", code="connection_lost")


def _lost(terminal: TerminalSocket[Any]) -> TransientError:
    return TransientError(
        f"could not {terminal.operation}: the connection broke off", code="connection_lost", hint=terminal.lost_hint
    )


def _resize_message(size: TerminalSize) -> str:
    return json.dumps({"type": "resize", "columns": size.columns, "rows": size.rows})


def _read_frame(frame: str | bytes, parse: Callable[[bytes], E]) -> E | ProcessOutput:
    return ProcessOutput("pty", frame) if isinstance(frame, bytes) else parse(frame.encode())


def _connect(address: _Address) -> AbstractContextManager[Socket]:
    """Used as a context manager: what a later version of the library opens, and what this one has opened already."""
    opened = cast("Callable[..., AbstractContextManager[Socket]]", connect)
    return opened(address.url, **_with_socket(address.options))


class Terminal(Generic[E]):
    """An open terminal. Iterate it for its events: of one made by ``open_terminal`` ProcessStarted, ProcessOutput, and at
    the end ProcessEnded; of one that lives on, those of ``terminal_calls.ViewerEvent``."""

    def __init__(self, endpoint: Endpoint, terminal: TerminalSocket[E]) -> None:
        self._terminal = terminal
        self._first: E | ProcessOutput | None = None
        address = _address(endpoint, terminal.path)
        self._open = ExitStack()
        try:
            self._socket: Socket = self._open.enter_context(_connect(address))
        except (OSError, InvalidHandshake, WebSocketException) as error:
            raise _refused(endpoint, terminal.operation, error) from error

    def begin(self) -> Terminal[E]:
        """Wait for the first event, which tells whether there is such a terminal; ``receive`` gives it again."""
        try:
            self._first = self.receive()
        except BaseException:
            self.close()
            raise
        return self

    def receive(self) -> E | ProcessOutput:
        """The next event. Raises TransientError when the connection breaks off."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            return _read_frame(self._socket.recv(), self._terminal.parse)
        except ConnectionClosed as error:
            raise _lost(self._terminal) from error

    def __iter__(self) -> Iterator[E | ProcessOutput]:
        while True:
            event = self.receive()
            yield event
            if isinstance(event, ProcessEnded):
                return

    def send(self, data: bytes) -> None:
        """Type ``data`` into the terminal."""
        self._send(data)

    def resize(self, size: TerminalSize) -> None:
        self._send(_resize_message(size))

    def _send(self, message: str | bytes) -> None:
        try:
            self._socket.send(message)
        except ConnectionClosed as error:
            raise _lost(self._terminal) from error

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Terminal[E]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncTerminal(Generic[E]):
    """The same on asyncio; ``await AsyncTerminal.open(...)``."""

    def __init__(self, socket: AsyncSocket, terminal: TerminalSocket[E]) -> None:
        self._socket = socket
        self._terminal = terminal
        self._first: E | ProcessOutput | None = None

    @staticmethod
    async def open(endpoint: Endpoint, terminal: TerminalSocket[F]) -> AsyncTerminal[F]:
        address = _address(endpoint, terminal.path)
        try:
            return AsyncTerminal(await connect_async(address.url, **address.options), terminal)
        except (OSError, InvalidHandshake, WebSocketException) as error:
            raise _refused(endpoint, terminal.operation, error) from error

    async def begin(self) -> AsyncTerminal[E]:
        """Wait for the first event, which tells whether there is such a terminal; ``receive`` gives it again."""
        try:
            self._first = await self.receive()
        except BaseException:
            await self.close()
            raise
        return self

    async def receive(self) -> E | ProcessOutput:
        """The next event. Raises TransientError when the connection breaks off."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            return _read_frame(await self._socket.recv(), self._terminal.parse)
        except ConnectionClosed as error:
            raise _lost(self._terminal) from error

    async def __aiter__(self) -> AsyncIterator[E | ProcessOutput]:
        while True:
            event = await self.receive()
            yield event
            if isinstance(event, ProcessEnded):
                return

    async def send(self, data: bytes) -> None:
        """Type ``data`` into the terminal."""
        await self._send(data)

    async def resize(self, size: TerminalSize) -> None:
        await self._send(_resize_message(size))

    async def _send(self, message: str | bytes) -> None:
        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise _lost(self._terminal) from error

    async def close(self) -> None:
        await self._socket.close()

    async def __aenter__(self) -> AsyncTerminal[E]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
