"""The HTTP server, without signal handling of its own: the manager's program decides when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn

_GRACEFUL_SECONDS = 5
_BACKLOG = 1024


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class Server:
    """``listening`` is bound already, so that a port in use is found out before anything else is done."""

    def __init__(self, application: Any, listening: socket.socket) -> None:
        self._listening = listening
        self._server = _QuietServer(
            uvicorn.Config(
                application,
                loop="none",
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=_GRACEFUL_SECONDS,
                ws_max_size=1024 * 1024,
            )
        )

    async def serve(self) -> None:
        await self._server.serve(sockets=[self._listening])

    async def shut_down(self, serving: asyncio.Task[None]) -> None:
        """Take no new requests, let those under way end for a few seconds, cut the rest. Raises what made it fail."""
        self._server.should_exit = True
        await serving
