"""The HTTP server of an installation's previews. Owned by ``__main__``, told by ``control``.

The manager says where to listen, at its start and every few seconds, as for SSH. On a TCP port this is all there is
between browsers and sandboxes; on a unix socket there is a front proxy before it (deploy/caddy), which has the TLS and says
whose a request is. What is open stays open unless the address changes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from pathlib import Path
from typing import Final, cast

from atelier.gateway.byte_stream import ByteStream
from atelier.gateway.http_bodies import BodyBroken
from atelier.gateway.preview_door import PreviewDoor
from atelier.gateway.preview_exchange import PreviewConnection, PreviewRoom
from atelier.gateway.preview_headers import Arrival
from atelier.gateway.preview_upstream import Upstreams
from atelier.host.line_server import Answer, Request
from atelier.model.errors import HostError, InvalidRequestError, PortInUseError
from atelier.model.layout import RunLayout, check_socket_path

log = logging.getLogger(__name__)

_VISITORS_MAX: Final = 4096
_BACKLOG: Final = 1024
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
_SOCKET_MODE: Final = 0o660
"""Its folder says who reaches it; a front proxy's user may be of its group."""


class PreviewServer:
    """Serves nobody until ``serve`` is asked of it."""

    def __init__(self, run: RunLayout) -> None:
        self._run = run
        self._server: asyncio.Server | None = None
        self._asked = ("", 0, "")
        self._room: PreviewRoom | None = None
        self._visitors: dict[asyncio.Task[None], asyncio.Transport] = {}

    async def answer(self, request: Request) -> Answer:
        """``{"host", "port", "socket_path"}``; host and socket_path empty: serve nobody. Answers ``port``, the real one, or
        0 for a socket.

        Raises InvalidRequestError, PortInUseError, HostError."""
        host, port, path = request.get("host"), request.get("port"), request.get("socket_path")
        if not isinstance(host, str) or not isinstance(port, int) or not isinstance(path, str):
            raise InvalidRequestError("serve_previews takes host, port and socket_path")
        asked = (host, port, path)
        if self._asked != asked or (self._server is None and (host or path)):
            await self.close()
            if host or path:
                self._server = await self._listen(host, port, path)
                log.info("previews are served at %s", path or f"{host}, port {self._port()}")
            self._asked = asked
        return {"ok": True, "port": self._port()}

    async def close(self) -> None:
        """Cut all visitors."""
        server, self._server, path = self._server, None, self._asked[2]
        self._asked = ("", 0, "")
        if server is None:
            return
        server.close()
        if path:
            Path(path).unlink(missing_ok=True)
        for visitor in list(self._visitors):
            visitor.cancel()
        await asyncio.gather(*self._visitors, return_exceptions=True)
        if self._room is not None:
            self._room.upstreams.close()
            self._room.door.close()
            self._room = None

    def _port(self) -> int:
        if self._server is None or self._asked[2]:
            return 0
        listening = self._server.sockets[0]
        return int(listening.getsockname()[1]) if listening.family != socket.AF_UNIX else 0

    async def _listen(self, host: str, port: int, path: str) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        room = self._room = PreviewRoom(PreviewDoor(self._run.manager_socket), Upstreams(self._run))

        def welcome() -> _Visitor:
            return _Visitor(self, room)

        try:
            if not path:
                return await loop.create_server(welcome, host, port, backlog=_BACKLOG)
            final = check_socket_path(Path(path))
            fresh = final.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            server = await loop.create_unix_server(welcome, str(fresh), backlog=_BACKLOG)
            fresh.chmod(_SOCKET_MODE)
            fresh.rename(final)
            return server
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(f"port {port} of {host} is in use by another program") from error
            where = path or f"{host}, port {port}"
            raise HostError(f"cannot listen on {where}: {error.strerror or error}") from error

    def begin(self, connection: PreviewConnection, transport: asyncio.Transport) -> asyncio.Task[None] | None:
        """Serve a visitor who has come; None: there are too many."""
        if len(self._visitors) >= _VISITORS_MAX:
            return None
        task = asyncio.create_task(_serve(connection, transport))
        self._visitors[task] = transport
        task.add_done_callback(lambda done: self._visitors.pop(done, None) and None)
        return task


class _Visitor(ByteStream):
    """A connection that ends with its visitor: whoever closes their side, as browsers and proxies do to break off, waits
    for nothing more."""

    def __init__(self, server: PreviewServer, room: PreviewRoom) -> None:
        super().__init__()
        self._server = server
        self._room = room
        self._serving: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connected: socket.socket = transport.get_extra_info("socket")
        arrival = None
        if connected.family != socket.AF_UNIX:
            peer = cast("tuple[object, ...]", transport.get_extra_info("peername"))
            arrival = Arrival(str(peer[0]), "http")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._serving = self._server.begin(PreviewConnection(self._room, self, arrival), self.transport)
        if self._serving is None:
            self.abort()

    def eof_received(self) -> bool | None:
        super().eof_received()
        self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end()

    def _end(self) -> None:
        if self._serving is not None:
            self._serving.cancel()


async def _serve(connection: PreviewConnection, transport: asyncio.Transport) -> None:
    try:
        await connection.serve()
    except (ConnectionError, TimeoutError, BodyBroken):
        # The visitor has gone, or is too slow.
        pass
    except Exception:
        log.exception("a preview's connection ended by a mistake of the gateway's")
    finally:
        transport.close()
