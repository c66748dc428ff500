"""A resolver between guests with addresses of 127/8 and nameservers of the test's own, all on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address

import dns.edns
import dns.message
import dns.query
from tests.nameserver import Nameserver

from atelier.model.errors import PortInUseError
from atelier.model.network_policy import EgressMode, EgressPolicy
from atelier.network_holder.dns_server import DnsServer, ListeningSockets, ServerLimits
from atelier.network_holder.dns_upstream import Upstream
from atelier.network_holder.resolver import Resolver

GUEST, OTHER, STRANGER = "127.0.7.1", "127.0.7.2", "127.0.7.3"
PATIENCE_SECONDS = 30.0


@dataclass
class Gate:
    """Opens what is public."""

    policies: dict[str, EgressPolicy] = field(default_factory=dict)
    opened: list[tuple[str, list[str], int]] = field(default_factory=list)
    fails_with: Exception | None = None

    def policy_of(self, guest: IPv4Address) -> EgressPolicy | None:
        return self.policies.get(str(guest))

    def open_addresses(self, guest: IPv4Address, addresses: Sequence[IPv4Address], seconds: int) -> list[IPv4Address]:
        if self.fails_with is not None:
            raise self.fails_with
        public = [address for address in addresses if address.is_global]
        self.opened.append((str(guest), [str(address) for address in public], seconds))
        return public


def make_socket(family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    return socket.socket(family, kind | socket.SOCK_NONBLOCK)


def listed(*domains: str) -> EgressPolicy:
    return EgressPolicy.make(EgressMode.LIST, [], domains)


@dataclass
class ResolverStage:
    gate: Gate
    nameserver: Nameserver
    second: Nameserver
    address: tuple[str, int]

    async def send(self, wire: bytes, guest: str = GUEST, seconds: float = PATIENCE_SECONDS) -> bytes | None:
        """The answer to a datagram, None: there was none in time."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sending:
            sending.bind((guest, 0))
            await loop.sock_connect(sending, self.address)
            await loop.sock_sendall(sending, wire)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    return await loop.sock_recv(sending, 65536)
        return None

    async def ask(
        self, name: str, kind: str = "A", guest: str = GUEST, *, stream: bool = False, **options: object
    ) -> dns.message.Message:
        query = dns.message.make_query(name, kind, **options)
        if stream:
            reader, writer = await self.connect(guest)
            wire = query.to_wire()
            writer.write(len(wire).to_bytes(2) + wire)
            async with asyncio.timeout(PATIENCE_SECONDS):
                answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            writer.close()
        else:
            answer = await self.send(query.to_wire(), guest)
            assert answer is not None, f"no answer for {name}"
        message = dns.message.from_wire(answer)
        assert message.id == query.id
        assert message.question == query.question
        return message

    async def connect(self, guest: str = GUEST) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address, local_addr=(guest, 0))


async def _serve_both(stack: AsyncExitStack, first: Nameserver, second: Nameserver) -> int:
    """On a port that is free on both addresses: other tests take ports too."""
    while True:
        async with AsyncExitStack() as attempt:
            port = await attempt.enter_async_context(first.serving("127.0.0.1"))
            try:
                await attempt.enter_async_context(second.serving("127.0.0.2", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            stack.push_async_exit(attempt.pop_all())
            return port


def _listening_sockets() -> ListeningSockets:
    while True:
        with contextlib.suppress(PortInUseError):
            return ListeningSockets(IPv4Address("127.0.0.53"), 0)


@contextlib.asynccontextmanager
async def resolver_stage(
    limits: ServerLimits | None = None, try_seconds: float = 1.5, total_seconds: float = 4.5
) -> AsyncIterator[ResolverStage]:
    """Both nameservers serve, the first on 127.0.0.1, the second on 127.0.0.2."""
    async with AsyncExitStack() as stack:
        first, second, gate = Nameserver(), Nameserver(), Gate()
        port = await _serve_both(stack, first, second)
        upstream = Upstream(
            lambda: (IPv4Address("127.0.0.1"), IPv4Address("127.0.0.2")),
            make_socket,
            port=port,
            try_seconds=try_seconds,
            total_seconds=total_seconds,
        )
        sockets = _listening_sockets()
        address = sockets.datagrams.getsockname()
        serving = asyncio.create_task(DnsServer(Resolver(gate, upstream), sockets, limits).serve())
        try:
            yield ResolverStage(gate, first, second, address)
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving


def error_codes(message: dns.message.Message) -> list[int]:
    return [option.code for option in message.options if isinstance(option, dns.edns.EDEOption)]


def addresses(message: dns.message.Message) -> list[str]:
    return [each.address for rrset in message.answer for each in rrset if hasattr(each, "address")]
