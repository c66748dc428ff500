"""The host's side of ``raw_guest.py``: starts it in a bare machine and asks it things over the raw port."""

from __future__ import annotations

import base64
import contextlib
import socket
from collections.abc import Generator
from pathlib import Path

from benchmarks.bare_machine import RAW_PORT_NAME, Ingredients, bare_machine
from benchmarks.direct_channel import DirectChannel

_PIECE_BYTES = 256 * 1024


class RawPort:
    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def ask(self, line: str, payload: memoryview | None = None) -> str:
        """Send a line (and bytes once the guest wants them), return the answer's line."""
        self._socket.sendall(line.encode() + b"\n")
        if payload is not None:
            if (answer := self.read_line()) != "go":
                raise RuntimeError(f"the raw guest does not take the payload: {answer}")
            self._socket.sendall(payload)
        return self.read_line()

    def read_line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            # Byte by byte: what follows the line belongs to somebody else.
            piece = self._socket.recv(1)
            if not piece:
                raise RuntimeError("the bare machine closed the raw port")
            line += piece
        return line[:-1].decode()

    def receive_into(self, target: memoryview) -> None:
        received = 0
        while received < len(target):
            count = self._socket.recv_into(target[received : received + _PIECE_BYTES])
            if count == 0:
                raise RuntimeError("the bare machine closed the raw port")
            received += count


@contextlib.contextmanager
def raw_guest(folder: Path, ingredients: Ingredients) -> Generator[RawPort]:
    """A bare machine in which ``raw_guest.py`` waits for requests, as the user ``user``."""
    with (
        bare_machine(folder, ingredients, with_raw_port=True) as machine,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
    ):
        machine.await_socket()
        connection.settimeout(300)
        connection.connect(str(machine.raw_socket))
        channel = DirectChannel(machine.folder.guest_socket, token="")
        try:
            script = base64.b64encode((Path(__file__).parent / "raw_guest.py").read_bytes()).decode()
            find_port = (
                'for port in /sys/class/virtio-ports/*; do read -r name <"$port/name"; '
                f'[ "$name" = {RAW_PORT_NAME} ] && device=/dev/${{port##*/}}; done; '
                f"echo {script} | base64 -d >/run/raw_guest.py && exec python3 /run/raw_guest.py $device"
            )
            channel.run("/bin/sh", "-c", find_port, user="root", background=True)
            port = RawPort(connection)
            if port.read_line() != "ready":
                raise RuntimeError("the raw guest script did not start")
            yield port
        finally:
            channel.close()
