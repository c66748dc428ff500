"""The holder's socket: one JSON line there, one back; an open TAP comes beside its line (SCM_RIGHTS).

The manager's network driver calls it. Whoever reaches the socket may be wrong: every argument is checked here. Requests
are performed one at a time, in the order in which they come, and not for a client that has gone meanwhile: it may be a dead
manager, and the next one have asked for the opposite. Operations: ping, ensure_slot, ensure_slots_absent,
open_slot, set_policy, read_usage, list_slots, check, close.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import atelier
from atelier.host.peers import has_gone
from atelier.host.service_notices import tell_service_manager
from atelier.model.errors import AtelierError, ConflictError, InvalidRequestError
from atelier.model.ids import is_sandbox_id
from atelier.model.layout import check_socket_path
from atelier.model.network_policy import NetworkPolicy
from atelier.network_holder.freeing import free_together
from atelier.network_holder.home import NetworkHome
from atelier.network_holder.slots import Lease

PROTOCOL_VERSION = 3
_REQUEST_MAX_BYTES = 512 * 1024
"""A policy with as many of the longest domain names as it may have takes half of it."""
_CHUNK_BYTES = 65536
_IDLE_SECONDS = 10.0
_MAX_CLIENTS = 256
"""As many sandboxes may be destroyed at once; further ones wait to be accepted."""
_BACKLOG = 1024
"""Where that many wait, a connection is refused: one for each slot."""
_LOCAL_UNICAST_MAC = re.compile(r"[0-9a-f][26ae](:[0-9a-f]{2}){5}")

_logger = logging.getLogger(__name__)

Answer = dict[str, Any]
Request = dict[str, object]


@dataclass
class NetworkControl:
    """``end`` is set when a client has asked for the home's end."""

    home: NetworkHome
    path: Path
    end: asyncio.Event = field(default_factory=asyncio.Event)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _clients: set[asyncio.Task[None]] = field(default_factory=lambda: set[asyncio.Task[None]]())

    async def serve(self) -> None:
        """Until it is cancelled. Raises HostError for a path that is too long, OSError."""
        check_socket_path(self.path)
        fresh = self.path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listening:
            listening.bind(str(fresh))
            # Under its own name only once it listens and is closed to others.
            fresh.chmod(0o600)
            listening.listen(_BACKLOG)
            fresh.rename(self.path)
            tell_service_manager("READY=1")
            try:
                while True:
                    while len(self._clients) >= _MAX_CLIENTS:
                        await asyncio.wait(self._clients, return_when=asyncio.FIRST_COMPLETED)
                    connection, _ = await loop.sock_accept(listening)
                    client = asyncio.create_task(self._serve_client(connection))
                    self._clients.add(client)
                    client.add_done_callback(self._clients.discard)
            finally:
                self.path.unlink(missing_ok=True)
                for client in list(self._clients):
                    client.cancel()
                await asyncio.gather(*self._clients, return_exceptions=True)

    async def check(self) -> bool:
        async with self._lock:
            return not self.end.is_set() and await self.home.check()

    async def _serve_client(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with connection, contextlib.suppress(OSError, TimeoutError):
            pending = b""
            while True:
                async with asyncio.timeout(_IDLE_SECONDS):
                    data = await asyncio.get_running_loop().sock_recv(connection, _CHUNK_BYTES)
                if not data:
                    return
                pending += data
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    await self._reply(connection, line)
                if len(pending) > _REQUEST_MAX_BYTES:
                    await self._send(connection, _failure("invalid_request", "the request is too long"), None)
                    return

    async def _reply(self, connection: socket.socket, line: bytes) -> None:
        descriptor: int | None = None
        try:
            answer, descriptor = await self._answer(line, connection)
            await self._send(connection, answer, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    async def _send(self, connection: socket.socket, answer: Answer, descriptor: int | None) -> None:
        rest = json.dumps(answer).encode() + b"\n"
        if descriptor is not None:
            rest = rest[socket.send_fds(connection, [rest], [descriptor]) :]
        async with asyncio.timeout(_IDLE_SECONDS):
            await asyncio.get_running_loop().sock_sendall(connection, rest)

    async def _answer(self, line: bytes, asker: socket.socket) -> tuple[Answer, int | None]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _failure("invalid_request", "the request is no JSON"), None
        if not isinstance(request, dict):
            return _failure("invalid_request", "the request is no JSON object"), None
        try:
            async with self._lock:
                if has_gone(asker.fileno()):
                    raise ConflictError("who asked for this has gone", code="asker_gone")
                return await self._perform(cast(Request, request))
        except Exception as error:
            return _failure_of(error), None

    async def _perform(self, request: Request) -> tuple[Answer, int | None]:
        operations: dict[object, Callable[[Request], Awaitable[Answer]]] = {
            "ping": self._on_ping,
            "ensure_slot": self._on_ensure_slot,
            "ensure_slots_absent": self._on_ensure_slots_absent,
            "set_policy": self._on_set_policy,
            "read_usage": self._on_read_usage,
            "list_slots": self._on_list_slots,
            "check": self._on_check,
            "close": self._on_close,
        }
        name = request.get("operation")
        if name == "open_slot":
            return {"ok": True}, self.home.slots.open_tap(_sandbox_id(request))
        operation = operations.get(name) if isinstance(name, str) else None
        if operation is None:
            known = ", ".join([*(str(each) for each in operations), "open_slot"])
            raise InvalidRequestError(f"unknown operation: the network holder knows {known}")
        return {"ok": True, **await operation(request)}, None

    async def _on_ping(self, request: Request) -> Answer:
        del request
        return {
            "pid": os.getpid(),
            "version": atelier.__version__,
            "protocol_version": PROTOCOL_VERSION,
            "subnet": str(self.home.plan.subnet),
            "problems": self.home.problems(),
        }

    async def _on_ensure_slot(self, request: Request) -> Answer:
        lease = Lease(_sandbox_id(request), _lease(request), _mac_address(request))
        guest = await self.home.slots.ensure(lease, _policy(request))
        return {"guest": asdict(guest), "device_name": self.home.slots.tap_name(lease.sandbox_id)}

    async def _on_ensure_slots_absent(self, request: Request) -> Answer:
        failed = free_together(self.home.slots, _sandbox_ids(request))
        return {"failed": {sandbox_id: _failure_of(error) for sandbox_id, error in failed.items()}}

    async def _on_set_policy(self, request: Request) -> Answer:
        await self.home.slots.set_policy(_sandbox_id(request), _policy(request))
        return {}

    async def _on_read_usage(self, request: Request) -> Answer:
        del request
        return {"usage": {sandbox_id: asdict(usage) for sandbox_id, usage in self.home.slots.read_usage().items()}}

    async def _on_list_slots(self, request: Request) -> Answer:
        del request
        return {"slots": self.home.slots.ids()}

    async def _on_check(self, request: Request) -> Answer:
        del request
        return {"put_back": await self.home.check()}

    async def _on_close(self, request: Request) -> Answer:
        del request
        await self.home.remove()
        self.end.set()
        return {}


def _sandbox_id(request: Request) -> str:
    value = request.get("sandbox_id")
    if not isinstance(value, str) or not is_sandbox_id(value):
        raise InvalidRequestError("sandbox_id is missing, or is no sandbox id")
    return value


def _sandbox_ids(request: Request) -> list[str]:
    value = request.get("sandbox_ids")
    if not isinstance(value, list):
        raise InvalidRequestError("sandbox_ids is missing, or is no list")
    return [_sandbox_id({"sandbox_id": each}) for each in dict.fromkeys(map(str, cast("list[object]", value)))]


def _lease(request: Request) -> int:
    value = request.get("lease")
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidRequestError("lease is missing, or is no number from 0")
    return value


def _mac_address(request: Request) -> str:
    value = request.get("mac_address")
    if not isinstance(value, str) or _LOCAL_UNICAST_MAC.fullmatch(value) is None:
        raise InvalidRequestError("mac_address is missing, or is no locally administered unicast address")
    return value


def _policy(request: Request) -> NetworkPolicy:
    if "policy" not in request:
        raise InvalidRequestError("policy is missing")
    return NetworkPolicy.from_json(request["policy"])


def _failure_of(error: Exception) -> Answer:
    if isinstance(error, AtelierError):
        return _failure(error.code, error.message, error.hint)
    if isinstance(error, OSError):
        return _failure("host_error", f"the network holder could not do it: {error}")
    _logger.error("a request failed", exc_info=error)
    return _failure("internal", "a mistake in the network holder; its log says more")


def _failure(code: str, message: str, hint: str = "") -> Answer:
    return {"ok": False, "code": code, "message": message, "hint": hint}
