"""Asks this machine's nameservers on behalf of guests, over sockets that are made in the machine's own namespace.

Called by ``resolver``. Each question goes out with an identifier and from a port of its own, and only the nameserver
that was asked can answer it (the socket is connected). A nameserver that says nothing, or that it failed, is not waited
for: the next one is asked beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from dns.rcode import Rcode

from atelier.network_holder.dns_messages import answers, rcode_of, with_identifier
from atelier.network_holder.dns_streams import read_message, send_message

DNS_PORT = 53

_TRIES = 3
_TRY_SECONDS = 1.5
"""Until the next nameserver is asked too."""
_TOTAL_SECONDS = 4.5
"""A little less than what resolver libraries wait, which is 5 s: they learn that it failed. Source: resolv.conf(5)."""
_SILENT_TRIES = 3
_AVOIDED_SECONDS = 30.0
_MESSAGE_MAX_BYTES = 65535

Address = IPv4Address | IPv6Address


class SocketMaker(Protocol):
    """Makes a fresh socket, not blocking, in the namespace from which the nameservers are reached."""

    def __call__(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket: ...


class NoAnswerError(Exception):
    """No nameserver answered in time."""


class Upstream:
    """``nameservers`` tells those that are to be asked, in this order, as they are by now."""

    def __init__(
        self,
        nameservers: Callable[[], Sequence[Address]],
        make_socket: SocketMaker,
        *,
        port: int = DNS_PORT,
        try_seconds: float = _TRY_SECONDS,
        total_seconds: float = _TOTAL_SECONDS,
    ) -> None:
        self.nameservers = nameservers
        self._make_socket = make_socket
        self._port = port
        self._try_seconds = try_seconds
        self._total_seconds = total_seconds
        self._silent_tries: dict[Address, int] = {}
        self._avoided_until: dict[Address, float] = {}

    async def ask(self, question: bytes, *, stream: bool) -> bytes:
        """The answer to a message with one question, with the identifier that the question has. ``stream``: over TCP,
        else over UDP, where it may be truncated. A failure that a nameserver tells (SERVFAIL, REFUSED) is the answer if
        none has a better one. Raises NoAnswerError."""
        unique = with_identifier(question, secrets.randbelow(0x10000))
        pending: dict[asyncio.Task[bytes], Address] = {}
        failure: bytes | None = None
        answered: set[Address] = set()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._total_seconds
        tries = list(itertools.islice(itertools.cycle(self._in_order()), _TRIES))
        try:
            for number, nameserver in enumerate(tries, start=1):
                if nameserver not in answered:
                    pending[asyncio.create_task(self._exchange(nameserver, unique, stream=stream))] = nameserver
                until = end if number == len(tries) else min(end, loop.time() + self._try_seconds)
                while pending and (seconds := until - loop.time()) > 0:
                    done, _ = await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        by = pending.pop(task)
                        answer = self._result(task, by)
                        if answer is None:
                            continue
                        if rcode_of(answer) not in (Rcode.SERVFAIL, Rcode.REFUSED):
                            return with_identifier(answer, int.from_bytes(question[:2]))
                        failure = answer
                        answered.add(by)
                for silent in pending.values():
                    self._note_silence(silent)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if failure is None:
            raise NoAnswerError
        return with_identifier(failure, int.from_bytes(question[:2]))

    def _result(self, task: asyncio.Task[bytes], nameserver: Address) -> bytes | None:
        try:
            answer = task.result()
        except (OSError, EOFError):
            self._note_silence(nameserver)
            return None
        self._silent_tries.pop(nameserver, None)
        self._avoided_until.pop(nameserver, None)
        return answer

    def _in_order(self) -> list[Address]:
        """Those that said nothing of late stand last. The order is all that one guest's questions can change for
        another's."""
        known = list(dict.fromkeys(self.nameservers()))
        for table in (self._silent_tries, self._avoided_until):
            for gone in table.keys() - set(known):
                del table[gone]
        now = asyncio.get_running_loop().time()
        return sorted(known, key=lambda nameserver: self._avoided_until.get(nameserver, 0) > now)

    def _note_silence(self, nameserver: Address) -> None:
        count = self._silent_tries[nameserver] = self._silent_tries.get(nameserver, 0) + 1
        if count >= _SILENT_TRIES:
            self._avoided_until[nameserver] = asyncio.get_running_loop().time() + _AVOIDED_SECONDS

    async def _exchange(self, nameserver: Address, question: bytes, *, stream: bool) -> bytes:
        """Raises OSError, EOFError."""
        loop = asyncio.get_running_loop()
        family = socket.AF_INET if nameserver.version == 4 else socket.AF_INET6
        kind = socket.SOCK_STREAM if stream else socket.SOCK_DGRAM
        with contextlib.closing(self._make_socket(family, kind)) as connection:
            await loop.sock_connect(connection, (str(nameserver), self._port))
            if stream:
                await send_message(connection, question)
            else:
                await loop.sock_sendall(connection, question)
            while True:
                answer = await (read_message(connection) if stream else loop.sock_recv(connection, _MESSAGE_MAX_BYTES))
                if answers(answer, question):
                    return answer
