"""The SSH server of an installation: listens where the manager says. Owned by ``__main__``, told by ``control``.

The manager says it at its start and every few seconds, so that a gateway that was started anew serves again, and a port that
was taken is tried again. What is open stays open unless the address changes.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from atelier.host.line_server import Answer, Request
from atelier.model.errors import HostError, InvalidRequestError, PortInUseError
from atelier.model.layout import RunLayout

if TYPE_CHECKING:
    import asyncssh

    from atelier.gateway.ssh_connection import VisitorConnection

log = logging.getLogger(__name__)

_LOGIN_SECONDS: Final = 30
_KEEPALIVE_SECONDS: Final = 30
_VISITORS_MAX: Final = 1024


class SshServer:
    """Serves nobody until ``serve`` is asked of it."""

    def __init__(self, run: RunLayout) -> None:
        self._run = run
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._asked: tuple[str, int, str] | None = None
        self._visitors: set[VisitorConnection] = set()

    async def answer(self, request: Request) -> Answer:
        """``{"host", "port", "host_key_path"}``; host empty: serve nobody. Answers ``port``, the real one.

        Raises InvalidRequestError, PortInUseError, HostError."""
        host, port, key_path = request.get("host"), request.get("port"), request.get("host_key_path")
        if not isinstance(host, str) or not isinstance(port, int) or not isinstance(key_path, str):
            raise InvalidRequestError("serve_ssh takes host, port and host_key_path")
        if self._acceptor is None or self._asked != (host, port, key_path):
            await self.close()
            if not host:
                return {"ok": True, "port": 0}
            self._acceptor = await self._listen(host, port, Path(key_path))
            self._asked = (host, port, key_path)
            log.info("SSH is served at %s, port %d", host, self._acceptor.get_port())
        return {"ok": True, "port": self._acceptor.get_port()}

    async def close(self) -> None:
        """Cut all visitors."""
        acceptor, self._acceptor, self._asked = self._acceptor, None, None
        if acceptor is None:
            return
        acceptor.close()
        for visitor in list(self._visitors):
            visitor.close()
        await acceptor.wait_closed()

    async def _listen(self, host: str, port: int, key_path: Path) -> asyncssh.SSHAcceptor:
        # Here: an installation without SSH is spared its memory.
        import asyncssh

        from atelier.gateway.ssh_connection import VisitorConnection
        from atelier.gateway.ssh_entry import ManagerDoor
        from atelier.gateway.ssh_guest import PACKET_BYTES, WINDOW_BYTES, GuestLogins

        # Every login would be two lines otherwise, and each refusal a traceback of the visitor's making.
        logging.getLogger("asyncssh").setLevel(logging.ERROR)
        door, logins = ManagerDoor(self._run.manager_socket), GuestLogins()

        def welcome() -> VisitorConnection:
            if len(self._visitors) >= _VISITORS_MAX:
                raise ConnectionRefusedError("too many visitors")
            visitor = VisitorConnection(self._run, door, logins, self._visitors.discard)
            self._visitors.add(visitor)
            return visitor

        try:
            return await asyncssh.listen(
                host,
                port,
                server_factory=welcome,
                server_host_keys=[asyncssh.read_private_key(key_path)],
                config=None,
                encoding=None,
                line_editor=False,
                agent_forwarding=True,
                x11_forwarding=False,
                compression_algs=None,
                window=WINDOW_BYTES,
                max_pktsize=PACKET_BYTES,
                login_timeout=_LOGIN_SECONDS,
                keepalive_interval=_KEEPALIVE_SECONDS,
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUseError(f"port {port} of {host} is in use by another program") from error
            raise HostError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
        except asyncssh.Error as error:
            raise HostError(f"the SSH host key {key_path} cannot be used: {error}") from error
