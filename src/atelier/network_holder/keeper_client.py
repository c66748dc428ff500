"""The network holder's end of its keeper: namespaces, the way out, sockets of the host's.

Each request is answered before its call returns; the keeper does nothing else meanwhile, and takes under a millisecond.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, cast

import atelier
from atelier.host import namespaces, processes
from atelier.host.files import read_tail
from atelier.model.errors import HostError
from atelier.model.layout import RunLayout
from atelier.network_holder.keeper import PACKET_MAX_BYTES

_logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 10.0
_START_SECONDS = 20.0
_LAST_WORDS_BYTES = 2000


@dataclass(frozen=True, slots=True)
class NetworkKeeper:
    """Raises HostError (``network_keeper_gone``) from each method once the keeper has ended."""

    _connection: socket.socket

    @staticmethod
    def ensure(layout: RunLayout, installation_id: str, log_path: Path) -> NetworkKeeper:
        """The keeper that is there, or a new one; one of another version is replaced if no machine needs what it keeps.

        To be called where no event loop runs. Raises HostError with the keeper's last words when it does not start.
        """
        path = layout.network_keeper_socket
        found = _connect(path)
        if found is not None:
            if found.ask("describe")[0]["version"] == atelier.__version__ or found.ask("is_in_use")[0]["in_use"]:
                return found
            _logger.info("replacing the network keeper of another version")
            found.end()
        arguments = ["-m", "atelier.network_holder.keeper", "--run-dir", str(layout.root)]
        identity = asyncio.run(
            processes.start_detached(
                [sys.executable, *arguments, "--installation", installation_id], stderr_path=log_path
            )
        )
        deadline = time.monotonic() + _START_SECONDS
        while (started := _connect(path)) is None:
            if not processes.is_alive(identity) or time.monotonic() > deadline:
                lines = read_tail(log_path, _LAST_WORDS_BYTES).decode(errors="replace").strip().splitlines()
                raise HostError(
                    f"the network keeper did not start: {lines[-1] if lines else 'without a word'}",
                    code="network_keeper_failed",
                    hint=f"its log is {log_path}",
                )
            time.sleep(0.01)
        return started

    def enter(self) -> None:
        """Move this process into the namespaces, for good. It must not have a second thread."""
        _, (user, net) = self.ask("describe")
        try:
            namespaces.enter_user(user)
            namespaces.enter(net)
        finally:
            os.close(user)
            os.close(net)

    def fileno(self) -> int:
        """Readable when the keeper has ended, and only then."""
        return self._connection.fileno()

    def set_uplink(self, address: IPv4Interface, gateway: IPv4Address) -> None:
        """Start the way out, anew where it runs already."""
        self.ask("set_uplink", address=str(address), gateway=str(gateway))

    def uplink_address(self) -> str:
        """That of the way out that is kept running; empty if there is none."""
        return str(self.ask("describe")[0]["address"])

    def uplink_problem(self) -> str:
        """Why the way out ended when it last did; empty if it never has."""
        return str(self.ask("describe")[0]["problem"])

    def remove_uplink(self) -> None:
        self.ask("remove_uplink")

    def make_socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """A fresh one in this machine's own namespace, TCP or UDP, that does not block."""
        _, (descriptor,) = self.ask("make_socket", family=int(family), kind=int(kind))
        return socket.socket(fileno=descriptor)

    def end(self) -> None:
        """With all that it keeps. Returns when it is gone."""
        self.ask("end")
        while self._connection.recv(PACKET_MAX_BYTES):
            pass

    def close(self) -> None:
        self._connection.close()

    def ask(self, operation: str, **arguments: object) -> tuple[dict[str, Any], list[int]]:
        """(answer, descriptors that came with it, which are the caller's to close)."""
        packet = json.dumps({"operation": operation, **arguments}).encode()
        try:
            self._connection.sendall(packet)
            data, descriptors, _, _ = socket.recv_fds(self._connection, PACKET_MAX_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise _gone(str(error)) from error
        if not data:
            raise _gone("it has ended")
        answer = cast("dict[str, Any]", json.loads(data))
        if not answer["ok"]:
            raise HostError(f"the network keeper refused {operation}: {answer['message']}")
        return answer, descriptors


def _connect(path: Path) -> NetworkKeeper | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_TIMEOUT_SECONDS)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        return None
    return NetworkKeeper(connection)


def _gone(reason: str) -> HostError:
    return HostError(
        f"the process that keeps the sandboxes' network does not answer: {reason}",
        code="network_keeper_gone",
        hint="the manager starts another; restart sandboxes that were running to connect them to it",
    )
