"""The DNS server that guests ask, over UDP and TCP. Carries messages between them and the resolver, within bounds.

Started by ``__main__``, on the gateway's address in the home's namespace. The rules of the home see to it that only
guests reach it, and that each comes from its own address. Nothing that a guest sends ends it or fills the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Protocol

from atelier.model.errors import AtelierError, PortInUseError
from atelier.network_holder.dns_messages import failure
from atelier.network_holder.dns_streams import read_message, send_message
from atelier.network_holder.fair_share import GuestRates, GuestTasks

_DATAGRAM_MAX_BYTES = 4096
"""No question is longer; what is cut off here is malformed."""
_DATAGRAMS_AT_ONCE = 64
_QUEUE_BYTES = 4 * 1024 * 1024
_SO_RCVBUFFORCE = 33
_LISTEN_BACKLOG = 128
_LOG_PAUSE_SECONDS = 60.0

_logger = logging.getLogger(__name__)


class Answerer(Protocol):
    async def answer(self, guest: IPv4Address, wire: bytes, *, stream: bool) -> bytes | None: ...


class ListeningSockets:
    """On one address, for UDP and TCP. Made in the calling thread's namespace; they outlive the link that has the
    address, and serve again when it has come back."""

    def __init__(self, address: IPv4Address, port: int) -> None:
        """Raises PortInUseError, OSError."""
        try:
            self._open(address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortInUseError(
                f"the resolver of the sandboxes cannot listen on {address} port {port}: another program does",
                hint=f"ss -lntup 'sport = {port}' shows which; have it listen on addresses of its own only",
            ) from error

    def _open(self, address: IPv4Address, port: int) -> None:
        with contextlib.ExitStack() as stack:
            self.datagrams = stack.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            )
            _enlarge_queue(self.datagrams)
            self.datagrams.bind((str(address), port))
            self.streams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            self.streams.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.streams.bind(self.datagrams.getsockname())
            self.streams.listen(_LISTEN_BACKLOG)
            stack.pop_all()

    def close(self) -> None:
        self.datagrams.close()
        self.streams.close()


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one guest may ask, and all together. ``streams`` are TCP connections, ``idle_seconds`` how long one may keep
    the server waiting."""

    questions_per_second: float = 100.0
    questions_burst: float = 300.0
    questions_at_once: int = 64
    total_questions_at_once: int = 512
    streams: int = 8
    total_streams: int = 256
    idle_seconds: float = 10.0


def _enlarge_queue(datagrams: socket.socket) -> None:
    """So that questions of all guests at once find a place."""
    try:
        datagrams.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE_BYTES)
    except PermissionError:
        # As far as everybody may.
        datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE_BYTES)


class DnsServer:
    """Owns ``sockets``."""

    def __init__(self, answerer: Answerer, sockets: ListeningSockets, limits: ServerLimits | None = None) -> None:
        limits = limits or ServerLimits()
        self._answerer = answerer
        self._sockets = sockets
        self._idle_seconds = limits.idle_seconds
        self._rates = GuestRates(limits.questions_per_second, limits.questions_burst)
        self._questions = GuestTasks(limits.questions_at_once, limits.total_questions_at_once)
        self._streams = GuestTasks(limits.streams, limits.total_streams)
        self._silent_until = 0.0

    async def serve(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sockets.datagrams, self._receive_datagrams)
        try:
            await self._accept()
        finally:
            loop.remove_reader(self._sockets.datagrams)
            await self._streams.close()
            await self._questions.close()
            self._sockets.close()

    # --- UDP ----------------------------------------------------------------------------------------------------------

    def _receive_datagrams(self) -> None:
        # Not until there are none left: other guests' connections have their turn too.
        for _ in range(_DATAGRAMS_AT_ONCE):
            try:
                wire, sender = self._sockets.datagrams.recvfrom(_DATAGRAM_MAX_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                self._tell("a datagram cannot be received", error)
                return
            guest = IPv4Address(sender[0])
            # Before it is looked at, which costs the most.
            if self._rates.admit(guest):
                self._questions.start(guest, self._answer_datagram(guest, wire, sender))

    async def _answer_datagram(self, guest: IPv4Address, wire: bytes, sender: tuple[str, int]) -> None:
        answer = await self._answer(guest, wire, stream=False)
        if answer is not None:
            # Where it cannot be sent the guest asks again.
            with contextlib.suppress(OSError):
                self._sockets.datagrams.sendto(answer, sender)

    # --- TCP ----------------------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, sender = await loop.sock_accept(self._sockets.streams)
            except ConnectionError:
                # Gone already.
                continue
            except OSError as error:
                # No descriptors left, for instance.
                self._tell("a connection cannot be accepted", error)
                await asyncio.sleep(0.1)
                continue
            guest = IPv4Address(sender[0])
            task = self._streams.start(guest, self._serve_stream(guest, connection))
            if task is None:
                connection.close()
            else:
                task.add_done_callback(lambda _, connection=connection: connection.close())

    async def _serve_stream(self, guest: IPv4Address, connection: socket.socket) -> None:
        """One question after the other."""
        connection.setblocking(False)
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            while True:
                async with asyncio.timeout(self._idle_seconds):
                    wire = await read_message(connection)
                answer = await self._answer_within_limits(guest, wire)
                if answer is None:
                    return
                async with asyncio.timeout(self._idle_seconds):
                    await send_message(connection, answer)

    async def _answer_within_limits(self, guest: IPv4Address, wire: bytes) -> bytes | None:
        answers: list[bytes | None] = []

        async def work() -> None:
            answers.append(await self._answer(guest, wire, stream=True))

        task = self._questions.start(guest, work()) if self._rates.admit(guest) else None
        if task is None:
            return None
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
        return answers[0] if answers else None

    # --- both ---------------------------------------------------------------------------------------------------------

    async def _answer(self, guest: IPv4Address, wire: bytes, *, stream: bool) -> bytes | None:
        try:
            return await self._answerer.answer(guest, wire, stream=stream)
        except (AtelierError, OSError) as error:
            self._tell("one cannot be answered", error)
            return failure(wire)
        except Exception as error:
            self._tell("a mistake in the resolver", error, with_stack=True)
            return None

    def _tell(self, what: str, error: Exception, *, with_stack: bool = False) -> None:
        """Once in a while: a guest may cause it as often as it likes."""
        now = asyncio.get_running_loop().time()
        if now >= self._silent_until:
            self._silent_until = now + _LOG_PAUSE_SECONDS
            _logger.error("guests' questions for names: %s: %r", what, error, exc_info=error if with_stack else None)
