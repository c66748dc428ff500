"""A unix socket that only this user can open, on which programs of one installation ask each other things: one line of JSON
there, one back, in order.

Served by the gateway and by the manager, each with an ``answer`` of its own. Answers are ``{"ok": true, ...}`` or
``{"ok": false, "code", "message"}``. A mistake of the asker's, or one of ours, ends nothing but its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, cast

from atelier.model.errors import AtelierError
from atelier.model.layout import check_socket_path

log = logging.getLogger(__name__)

REQUEST_MAX_BYTES: Final = 64 * 1024

Request = dict[str, object]
Answer = dict[str, object]


class LineServer:
    """The socket at ``path``. Requests of one client are served one after the other. ``answer`` gets the request and the
    descriptor of the socket that it came by; it raises AtelierError, OSError."""

    def __init__(self, path: Path, answer: Callable[[Request, int], Awaitable[Answer]]) -> None:
        self._path = path
        self._answer_request = answer
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises HostError for a path that is too long, OSError."""
        check_socket_path(self._path)
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, path=str(fresh), limit=REQUEST_MAX_BYTES)
        # Under its own name only once it listens and is closed to others: a client that sees it can use it.
        fresh.chmod(0o600)
        fresh.rename(self._path)

    async def close(self) -> None:
        if self._server is None:
            return
        self._path.unlink(missing_ok=True)
        self._server.close()
        for client in list(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        asker: int = writer.get_extra_info("socket").fileno()
        self._clients.add(task)
        try:
            while True:
                try:
                    line = await reader.readuntil(b"\n")
                except asyncio.IncompleteReadError:
                    return
                except asyncio.LimitOverrunError:
                    writer.write(_encode(_failure("invalid_request", "the request is longer than 64 KiB")))
                    await writer.drain()
                    return
                writer.write(_encode(await self._answer(line, asker)))
                await writer.drain()
        except ConnectionError:
            return
        finally:
            self._clients.discard(task)
            with contextlib.suppress(OSError):
                writer.close()

    async def _answer(self, line: bytes, asker: int) -> Answer:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _failure("invalid_request", "the request is no JSON")
        if not isinstance(request, dict):
            return _failure("invalid_request", "the request is no JSON object")
        try:
            return await self._answer_request(cast(Request, request), asker)
        except AtelierError as error:
            return _failure(error.code, str(error))
        except OSError as error:
            return _failure("host_error", f"it could not be done: {error}")
        except Exception:
            log.exception("a request failed")
            return _failure("internal", "a mistake of Atelier's; the log says more")


async def ask(path: Path, request: Request) -> Answer:
    """The answer of the server at ``path``, ok or not. Raises OSError when nobody answers, ValueError for nonsense."""
    reader, writer = await asyncio.open_unix_connection(path, limit=REQUEST_MAX_BYTES)
    try:
        writer.write(_encode(request))
        await writer.drain()
        answer = json.loads(await reader.readuntil(b"\n"))
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the other side ended before it answered") from None
    finally:
        writer.close()
    if not isinstance(answer, dict):
        raise ValueError("the answer is no JSON object")
    return cast(Answer, answer)


def _failure(code: str, message: str) -> Answer:
    return {"ok": False, "code": code, "message": message}


def _encode(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"
