"""The unix socket of one sandbox on which ``CONNECT <port>`` reaches a port of the guest.

Made by ``control``, beside a ``channel``. The clients are the manager's guest driver and the gateway's own later parts;
the words are those that Firecracker's vsock socket speaks, so that above it there is one thing only. A client writes
``CONNECT <port>\\n`` (and may go on at once), gets ``OK <n>\\n`` once the guest has accepted, then the raw stream with half close both
ways; or ``ERROR <reason>\\n`` and the end. It must never leave a socket behind that others than this user can open.
Source: Firecracker docs/vsock.md.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from atelier.gateway.channel import GuestChannel
from atelier.guest_protocol.frames import CLOSE_REASON_NAMES, CLOSED_RESET, CLOSED_UNREACHABLE
from atelier.guest_protocol.splice import SocketSplice
from atelier.model.layout import check_socket_path

log = logging.getLogger(__name__)

MAX_CLIENTS: Final = 512

_REQUEST_SECONDS: Final = 10.0
_REQUEST_MAX_BYTES: Final = 32
_EARLY_BYTES: Final = 64 * 1024
_ACCEPT_SECONDS: Final = 15.0
_NO_DESCRIPTORS_PAUSE_SECONDS: Final = 0.2
_SWEEP_SECONDS: Final = 2.0


class _Refusal(Exception):
    """Said to the client as ``ERROR <reason>``."""


class ClientDoor:
    """Listens at ``path`` from ``open`` to ``close``. ``epoch_wait_seconds``: how long a client waits for a guest that
    is not there yet."""

    def __init__(self, channel: GuestChannel, path: Path, *, epoch_wait_seconds: float) -> None:
        self._channel = channel
        self._path = path
        self._epoch_wait_seconds = epoch_wait_seconds
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._splices: set[SocketSplice] = set()
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def client_count(self) -> int:
        return len(self._splices)

    def open(self) -> None:
        """Bind and listen, in the place of whatever socket an earlier gateway left. Raises OSError, HostError."""
        check_socket_path(self._path)
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(fresh))
            fresh.chmod(0o600)
            listener.listen(256)
            fresh.rename(self._path)
        except BaseException:
            listener.close()
            fresh.unlink(missing_ok=True)
            raise
        self._listener = listener
        self._track(self._accept(listener))
        self._sweep = self._loop.call_later(_SWEEP_SECONDS, self._drop_hung_up)

    async def close(self) -> None:
        """Stop listening and cut all clients."""
        if self._listener is None:
            return
        self._path.unlink(missing_ok=True)
        if self._sweep is not None:
            self._sweep.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for splice in list(self._splices):
            splice.finish(CLOSED_RESET)
        self._listener.close()
        self._listener = None

    def _track(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _drop_hung_up(self) -> None:
        for splice in list(self._splices):
            splice.drop_if_hung_up()
        self._sweep = self._loop.call_later(_SWEEP_SECONDS, self._drop_hung_up)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                log.warning("cannot accept at %s: %s", self._path.name, error)
                await asyncio.sleep(_NO_DESCRIPTORS_PAUSE_SECONDS)
                continue
            connection.setblocking(False)
            self._track(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        splice: SocketSplice | None = None
        try:
            answer: asyncio.Future[int | None] = self._loop.create_future()

            def opened() -> None:
                if not answer.done():
                    answer.set_result(None)

            def gone(reason: int) -> None:
                if splice is not None:
                    self._splices.discard(splice)
                if not answer.done():
                    answer.set_result(reason)

            port, early = await self._read_request(connection)
            if len(self._splices) >= MAX_CLIENTS:
                raise _Refusal("busy")
            splice = SocketSplice(self._loop, on_opened=opened, on_gone=gone)
            self._splices.add(splice)
            number = await self._open_stream(splice, port, early, answer)
            await self._loop.sock_sendall(connection, f"OK {number}\n".encode())
            splice.attach(connection)
        except _Refusal as refusal:
            if splice is not None:
                splice.finish(CLOSED_RESET)
            await _refuse(self._loop, connection, str(refusal))
        except OSError:
            # The client has gone before it was served.
            if splice is not None:
                splice.finish(CLOSED_RESET)
            connection.close()
        except asyncio.CancelledError:
            if splice is not None:
                splice.finish(CLOSED_RESET)
            connection.close()
            raise

    async def _read_request(self, connection: socket.socket) -> tuple[int, bytes]:
        received = b""
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                while b"\n" not in received[:_REQUEST_MAX_BYTES]:
                    if len(received) >= _REQUEST_MAX_BYTES:
                        raise _Refusal("bad_request")
                    more = await self._loop.sock_recv(connection, _EARLY_BYTES)
                    if not more:
                        raise ConnectionResetError("no request came")
                    received += more
        except TimeoutError:
            raise _Refusal("timeout") from None
        line, _, early = received.partition(b"\n")
        verb, _, number = line.partition(b" ")
        if verb != b"CONNECT" or not number.isdigit() or not 0 < int(number) < 65536:
            raise _Refusal("bad_request")
        return int(number), early

    async def _open_stream(
        self, splice: SocketSplice, port: int, early: bytes, answer: asyncio.Future[int | None]
    ) -> int:
        if not await self._channel.wait_open(self._epoch_wait_seconds):
            raise _Refusal("unreachable")
        stream = self._channel.open_stream(port, splice)
        if stream is None:
            raise _Refusal("busy")
        splice.join(stream, early)
        try:
            async with asyncio.timeout(_ACCEPT_SECONDS):
                reason = await answer
        except TimeoutError:
            raise _Refusal("timeout") from None
        if reason is not None:
            raise _Refusal(CLOSE_REASON_NAMES[CLOSED_UNREACHABLE if reason == CLOSED_RESET else reason])
        return stream.identifier


async def _refuse(loop: asyncio.AbstractEventLoop, connection: socket.socket, reason: str) -> None:
    with connection:
        try:
            await loop.sock_sendall(connection, f"ERROR {reason}\n".encode())
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            return
