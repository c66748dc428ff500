"""One SSH connection of a visitor's: who it is, which sandbox, and what is opened in it. Made by ``ssh_server``.

The login name is the sandbox's name or id, or ``<sandbox>+<user of the guest>``. Everything is relayed through one SSH connection to
the guest's sshd (a second one where a session brings an SSH agent and the first has none). The login name ``_`` is for jumps
(``ssh -J``): it opens nothing but streams to ``<sandbox>:22``, which are spliced to that guest's sshd as they are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Final, cast

import asyncssh
from asyncssh.constants import OPEN_CONNECT_FAILED
from asyncssh.forward import SSHForwarder
from asyncssh.listener import SSHListener

from atelier.gateway.ssh_entry import ManagerDoor
from atelier.gateway.ssh_guest import GuestLogins, open_stream
from atelier.gateway.ssh_session import VisitorSession
from atelier.model.errors import AccessDeniedError, AtelierError, TransientError
from atelier.model.layout import RunLayout

log = logging.getLogger(__name__)

JUMP_USER: Final = "_"
DEFAULT_USER: Final = "user"
HOST_SUFFIX: Final = ".atelier"
"""May stand behind a sandbox's name, so that a ``Host`` pattern of a client's configuration can match it."""

_SSH_PORT: Final = 22
_USE_SECONDS: Final = 10.0
_MAX_REFERENCE_LENGTH: Final = 64


class VisitorConnection(asyncssh.SSHServer):
    """``on_lost`` is called when it has ended."""

    def __init__(
        self, run: RunLayout, door: ManagerDoor, logins: GuestLogins, on_lost: Callable[[VisitorConnection], None]
    ) -> None:
        self._run = run
        self._door = door
        self._logins = logins
        self._on_lost = on_lost
        self._connection: asyncssh.SSHServerConnection
        self._address = ""
        self._login = ""
        self._reference = ""
        self._user = DEFAULT_USER
        self._key_line = ""
        self._sandbox_id = ""
        self._is_in = False
        self._guests: dict[str | None, asyncio.Task[asyncssh.SSHClientConnection]] = {}
        self._noted_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def _blob(self) -> str:
        return self._key_line.split(" ", 1)[1]

    # --- who it is ----------------------------------------------------------------------------------------------------

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._address = str(conn.get_extra_info("peername", ("",))[0])

    def connection_lost(self, exc: Exception | None) -> None:
        if self._login and not self._is_in:
            log.info("refused over SSH: %r from %s", self._login[:_MAX_REFERENCE_LENGTH], self._address)
        for guest in self._guests.values():
            _close_when_there(guest)
        self._on_lost(self)

    def close(self) -> None:
        self._connection.abort()

    def begin_auth(self, username: str) -> bool:
        self._login = username
        reference, _, user = username.partition("+")
        self._reference, self._user = reference.removesuffix(HOST_SUFFIX), user or DEFAULT_USER
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        self._key_line = " ".join(key.export_public_key().decode().split()[:2])
        try:
            if username == JUMP_USER:
                return await self._door.is_known(self._blob)
            self._sandbox_id = await self._find(self._reference)
        except AccessDeniedError:
            return False
        except TransientError as error:
            log.warning("nobody can enter over SSH: %s", error.message)
            return False
        return True

    def auth_completed(self) -> None:
        self._is_in = True
        log.info("%s entered over SSH as %s", self._address, self._login)

    async def _find(self, reference: str) -> str:
        if not 0 < len(reference) <= _MAX_REFERENCE_LENGTH:
            raise AccessDeniedError("no sandbox has such a name", code="ssh_refused")
        return await self._door.find(reference, self._blob)

    # --- the way to the guest -----------------------------------------------------------------------------------------

    async def _log_in(self, agent_path: str | None) -> asyncssh.SSHClientConnection:
        """Raises AtelierError. Who asks at the same time shares one connection."""
        guest = self._guests.get(agent_path)
        if guest is None and agent_path is None:
            # What needs no agent goes by whatever connection there is.
            guest = next(iter(self._guests.values()), None)
        if guest is None or (guest.done() and (guest.cancelled() or guest.exception() or guest.result().is_closed())):
            guest = self._guests[agent_path] = asyncio.create_task(self._enter(agent_path))
        return await asyncio.shield(guest)

    async def _enter(self, agent_path: str | None) -> asyncssh.SSHClientConnection:
        await self._door.enter(self._sandbox_id, self._blob, self._address)
        channel = self._run.channel_socket(self._sandbox_id)
        return await self._logins.log_in(channel, self._sandbox_id, self._user, agent_path)

    def _note_use(self) -> None:
        now = time.monotonic()
        if now >= self._noted_at + _USE_SECONDS:
            self._noted_at = now
            task = asyncio.create_task(self._door.note_use(self._sandbox_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # --- what is opened -----------------------------------------------------------------------------------------------

    def session_requested(self) -> VisitorSession | bool:
        if self._login == JUMP_USER:
            return False
        return VisitorSession(lambda: self._log_in(self._connection.get_agent_path()), self._note_use)

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> Any:
        if self._login == JUMP_USER:
            return self._splice(dest_host, dest_port)
        return self._forward(lambda guest, peer: guest.create_connection(peer, dest_host, dest_port))

    def unix_connection_requested(self, dest_path: str) -> Any:
        if self._login == JUMP_USER:
            return False
        return self._forward(lambda guest, peer: guest.create_unix_connection(peer, dest_path))

    async def server_requested(self, listen_host: str, listen_port: int) -> SSHListener | bool:
        """A port in the guest, whose connections go to the visitor."""
        visitor: Any = self._connection

        async def accept(orig_host: str, orig_port: int) -> SSHForwarder:
            port = listen_port or listener.get_port()
            _, peer = await visitor.create_connection(self._new_peer, listen_host, port, orig_host, orig_port)
            return SSHForwarder(cast(SSHForwarder, peer))

        try:
            guest = await self._log_in(None)
            listener = await guest.create_server(accept, listen_host, listen_port)
        except (AtelierError, asyncssh.Error, OSError) as error:
            log.info("no port of %s could be forwarded: %s", self._sandbox_id, error)
            return False
        return listener

    async def unix_server_requested(self, listen_path: str) -> SSHListener | bool:
        """A socket in the guest, whose connections go to the visitor."""
        visitor: Any = self._connection

        async def accept() -> SSHForwarder:
            _, peer = await visitor.create_unix_connection(self._new_peer, listen_path)
            return SSHForwarder(cast(SSHForwarder, peer))

        try:
            guest = await self._log_in(None)
            return await guest.create_unix_server(accept, listen_path)
        except (AtelierError, asyncssh.Error, OSError) as error:
            log.info("no socket of %s could be forwarded: %s", self._sandbox_id, error)
            return False

    def _new_peer(self) -> SSHForwarder:
        return _CountedForwarder(self._note_use)

    async def _forward(self, connect: Callable[[asyncssh.SSHClientConnection, Any], Any]) -> SSHForwarder:
        try:
            guest = await self._log_in(None)
            _, peer = await connect(guest, self._new_peer)
        except (AtelierError, OSError) as error:
            raise asyncssh.ChannelOpenError(OPEN_CONNECT_FAILED, str(error)) from None
        return SSHForwarder(cast(SSHForwarder, peer))

    async def _splice(self, host: str, port: int) -> SSHForwarder:
        try:
            if port != _SSH_PORT:
                raise AccessDeniedError("a jump leads to port 22 of sandboxes only", code="ssh_refused")
            self._sandbox_id = sandbox_id = await self._find(host.removesuffix(HOST_SUFFIX))
            await self._door.enter(sandbox_id, self._blob, self._address)
            stream = await open_stream(self._run.channel_socket(sandbox_id), self._key_line)
        except AtelierError as error:
            raise asyncssh.ChannelOpenError(OPEN_CONNECT_FAILED, error.message) from None
        loop = asyncio.get_running_loop()
        _, peer = await loop.create_connection(self._new_peer, sock=stream)
        return SSHForwarder(peer)


class _CountedForwarder(SSHForwarder):
    """The guest's end of a forwarded connection: what comes from there is use."""

    def __init__(self, note_use: Callable[[], None]) -> None:
        super().__init__()
        self._note_use = note_use

    def data_received(self, data: bytes, datatype: asyncssh.DataType = None) -> None:
        self._note_use()
        super().data_received(data, datatype)


def _close_when_there(guest: asyncio.Task[asyncssh.SSHClientConnection]) -> None:
    def close(done: asyncio.Task[asyncssh.SSHClientConnection]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().abort()

    guest.cancel()
    guest.add_done_callback(close)
