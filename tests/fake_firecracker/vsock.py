"""The host's end of the fake machine's vsock: answers ``CONNECT <port>`` on a unix socket.

Source: Firecracker docs/vsock.md.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

from atelier.guest_protocol import GUEST_CHANNEL_VSOCK_PORT

ECHO_PORT = 1024
"""Of a guest without an agent: it sends back what it is sent. Nobody listens on any other."""
_FIRST_HOST_PORT = 1 << 30


class VsockServer:
    """``agent``: the unix socket of a guest agent, which listens on the channel's port; empty: there is none."""

    def __init__(self, path: Path, agent: str) -> None:
        self._agent = agent
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        """As taking a snapshot does: what is connected ends, who listens still listens."""
        connections, self._connections = self._connections, []
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError):
            line = b""
            while not line.endswith(b"\n"):
                received = connection.recv(1)
                if not received:
                    return
                line += received
            word, port = line.split()
            if word != b"CONNECT":
                return
            guest = self._connect(int(port))
            if guest is None:
                return
            self._connections.append(connection)
            connection.sendall(f"OK {_FIRST_HOST_PORT + len(self._connections)}\n".encode())
            with guest:
                back = threading.Thread(target=_copy, args=[guest, connection], daemon=True)
                back.start()
                _copy(connection, guest)
                back.join()

    def _connect(self, port: int) -> socket.socket | None:
        if port == GUEST_CHANNEL_VSOCK_PORT and self._agent:
            guest = socket.socket(socket.AF_UNIX)
            guest.connect(self._agent)
            return guest
        if port == ECHO_PORT:
            ours, its = socket.socketpair()
            threading.Thread(target=_copy, args=[its, its], daemon=True).start()
            return ours
        return None


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
