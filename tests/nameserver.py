"""A nameserver of the test's own, over UDP and TCP, that keeps every message it got: what guests' questions lead to.

As a program (``python -m tests.nameserver ADDRESS RECORDS``, records in JSON) it prints the names that it was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

Answer = Callable[[dns.message.Message], "dns.message.Message | bytes | list[bytes] | None"]
"""None: no answer; a list: several datagrams."""


def _bound_pair(address: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A UDP and a TCP socket on one port; 0: on one that is free for both."""
    while True:
        with contextlib.ExitStack() as stack:
            udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            tcp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            udp.bind((address, port))
            try:
                tcp.bind(udp.getsockname())
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port != 0:
                    raise
                continue
            stack.pop_all()
            return udp, tcp


class Nameserver:
    """``records``: lines as of a zone file by name (``{"a.example.com.": ["300 A 192.0.2.1"]}``); aliases are
    followed. ``answer`` takes the place of them where it is set."""

    def __init__(self, records: dict[str, list[str]] | None = None) -> None:
        self.records = records or {}
        self.answer: Answer = self.answer_from_records
        self.datagrams: list[bytes] = []
        self.ports: list[int] = []
        self.streams: list[bytes] = []

    @property
    def heard(self) -> list[dns.message.Message]:
        return [dns.message.from_wire(wire) for wire in (*self.datagrams, *self.streams)]

    def answer_from_records(self, asked: dns.message.Message) -> dns.message.Message:
        answer = dns.message.make_response(asked, recursion_available=True)
        question = asked.question[0]
        name = question.name.canonicalize()
        if name.to_text() not in self.records:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        for _ in range(20):
            alias = None
            for line in self.records.get(name.to_text(), []):
                ttl, kind, *rest = line.split(" ")
                rdtype = dns.rdatatype.from_text(kind)
                if rdtype not in (question.rdtype, dns.rdatatype.CNAME):
                    continue
                rrset = answer.find_rrset(answer.answer, name, dns.rdataclass.IN, rdtype, create=True)
                rrset.update(dns.rrset.from_text(name, int(ttl), "IN", kind, " ".join(rest)))
                rrset.update_ttl(int(ttl))
                if rdtype == dns.rdatatype.CNAME:
                    alias = dns.name.from_text(rest[0])
            if alias is None:
                break
            name = alias
        return answer

    def _answers(self, wire: bytes) -> list[bytes]:
        answer = self.answer(dns.message.from_wire(wire))
        if isinstance(answer, dns.message.Message):
            answer = answer.to_wire()
        return [] if answer is None else answer if isinstance(answer, list) else [answer]

    @contextlib.asynccontextmanager
    async def serving(
        self,
        address: str = "127.0.0.1",
        port: int = 0,
        inside: contextlib.AbstractContextManager[None] | None = None,
    ) -> AsyncIterator[int]:
        """Yields the port. ``inside``: where its sockets are made, a namespace for instance."""
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            with inside or contextlib.nullcontext():
                udp, tcp = _bound_pair(address, port)
            stack.enter_context(udp)
            stack.enter_context(tcp)

            def receive() -> None:
                with contextlib.suppress(BlockingIOError):
                    wire, sender = udp.recvfrom(65536)
                    self.datagrams.append(wire)
                    self.ports.append(sender[1])
                    for answer in self._answers(wire):
                        udp.sendto(answer, sender)

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    while True:
                        (length,) = struct.unpack("!H", await reader.readexactly(2))
                        wire = await reader.readexactly(length)
                        self.streams.append(wire)
                        for answer in self._answers(wire):
                            writer.write(struct.pack("!H", len(answer)) + answer)
                writer.close()

            server = await asyncio.start_server(serve, sock=tcp)
            loop.add_reader(udp, receive)
            try:
                yield udp.getsockname()[1]
            finally:
                loop.remove_reader(udp)
                server.close()


def truncated(asked: dns.message.Message) -> dns.message.Message:
    answer = dns.message.make_response(asked)
    answer.flags |= dns.flags.TC
    return answer


async def _serve(address: str, records: dict[str, list[str]]) -> None:
    nameserver = Nameserver(records)

    def answer(asked: dns.message.Message) -> dns.message.Message:
        print(asked.question[0].name, flush=True)
        return nameserver.answer_from_records(asked)

    nameserver.answer = answer
    async with nameserver.serving(address, 53):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], json.loads(sys.argv[2])))
