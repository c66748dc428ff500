"""QEMU's machine protocol over its unix socket: one command at a time, one JSON object a line.

Called by the QEMU driver. Speaks over a raw socket, so that descriptors can travel with a command. QEMU takes one
connection at a time: another one waits until the first is closed. A VMM is trusted
less than the manager: its lines, their number and its patience are bounded. Source: QEMU docs/interop/qmp-spec.txt.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from atelier.model.errors import VmmError

JsonObject = dict[str, object]

_LINE_LIMIT_BYTES = 1024 * 1024
_LINES_PER_ANSWER_LIMIT = 10_000
_RECEIVE_BYTES = 64 * 1024


class QmpConnection:
    """A connection in command mode. Events are passed over. Several tasks may use it: one command at a time is under
    way, and an answer that nobody waits for any more is passed over too."""

    def __init__(self, connected: socket.socket, timeout_seconds: float) -> None:
        self._socket = connected
        self._timeout_seconds = timeout_seconds
        self._received = bytearray()
        self._turn = asyncio.Lock()
        self._last_id = 0

    @classmethod
    async def open(cls, path: Path, *, timeout_seconds: float = 10.0) -> QmpConnection:
        """Connect and enter command mode. ``timeout_seconds`` bounds this and each command.

        Raises VmmError when nothing listens, or the VMM does not greet (as when it dies).
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = cls(connected, timeout_seconds)
        try:
            connected.setblocking(False)
            async with asyncio.timeout(timeout_seconds):
                await asyncio.get_running_loop().sock_connect(connected, str(path))
                greeting = await connection._line()
            if "QMP" not in greeting:
                raise VmmError(f"{path} does not speak QMP")
            await connection.execute("qmp_capabilities")
        except TimeoutError as error:
            connection.close()
            raise VmmError(f"the VMM did not greet on {path} within {timeout_seconds:g} s") from error
        except OSError as error:
            connection.close()
            raise VmmError(f"the VMM does not listen on {path}: {error.strerror or error}") from error
        except BaseException:
            connection.close()
            raise
        return connection

    async def execute(
        self, command: str, arguments: JsonObject | None = None, *, descriptors: Sequence[int] = ()
    ) -> object:
        """Run a command and return its ``return`` value. ``descriptors`` travel with it (``getfd``, ``add-fd``).

        Raises VmmError with QEMU's own words when it refuses, and when the connection ends or stays silent; the
        connection is of no use after the latter.
        """
        async with self._turn:
            return await self._execute(command, arguments, descriptors)

    async def _execute(self, command: str, arguments: JsonObject | None, descriptors: Sequence[int]) -> object:
        self._last_id += 1
        asked = {"execute": command, "arguments": arguments or {}, "id": self._last_id}
        message = json.dumps(asked).encode() + b"\n"
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._send(message, descriptors)
                for _ in range(_LINES_PER_ANSWER_LIMIT):
                    answer = await self._line()
                    if answer.get("id", self._last_id) != self._last_id:
                        continue
                    if "return" in answer:
                        return answer["return"]
                    if "error" in answer:
                        raise VmmError(f"QEMU refused {command}: {_description(answer['error'])}")
        except TimeoutError as error:
            raise VmmError(f"QEMU did not answer {command} within {self._timeout_seconds:g} s") from error
        except OSError as error:
            raise VmmError(f"QEMU went away during {command}: {error.strerror or error}") from error
        raise VmmError(f"QEMU sent {_LINES_PER_ANSWER_LIMIT} events and no answer to {command}")

    async def query(self, command: str, arguments: JsonObject | None = None) -> JsonObject:
        """As ``execute``, for the commands that answer with an object."""
        answer = await self.execute(command, arguments)
        if not isinstance(answer, dict):
            raise VmmError(f"QEMU answered {command} with something else than an object")
        return cast("JsonObject", answer)

    def close(self) -> None:
        self._socket.close()

    async def __aenter__(self) -> QmpConnection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _send(self, message: bytes, descriptors: Sequence[int]) -> None:
        if descriptors:
            # One command is under way at a time and it is short, so the socket's buffer is never full here; if a
            # broken VMM has stopped reading, this raises BlockingIOError, which is an OSError as any other.
            sent = socket.send_fds(self._socket, [message], list(descriptors))
            message = message[sent:]
        if message:
            await asyncio.get_running_loop().sock_sendall(self._socket, message)

    async def _line(self) -> JsonObject:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > _LINE_LIMIT_BYTES:
                raise VmmError(f"QEMU sent a line of more than {_LINE_LIMIT_BYTES} bytes")
            chunk = await asyncio.get_running_loop().sock_recv(self._socket, _RECEIVE_BYTES)
            if not chunk:
                raise VmmError("QEMU closed its control socket")
            self._received += chunk
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise VmmError("QEMU sent a line that is no JSON") from error
        if not isinstance(message, dict):
            raise VmmError("QEMU sent a line that is no JSON object")
        return cast("JsonObject", message)


def _description(error: object) -> str:
    if isinstance(error, dict):
        return str(cast("JsonObject", error).get("desc", "no reason given"))
    return "no reason given"
