"""A guest with a network stack of its own: a namespace whose card is tied to a sandbox's TAP, frame by frame.

So programs of a test ask for names and open connections as they would inside the machine. The frames are real; only the
machine around them is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import dns.message
import dns.rdatatype
from tests.network_lab import NetworkLab, wait_for_sleep

from atelier.host import tap
from atelier.host.namespaces import entered
from atelier.model.machine import NetworkAttachment
from atelier.model.network_policy import OPEN_POLICY, NetworkPolicy

_CARD = "eth0"
_PATIENCE_SECONDS = 10.0
_CLOSED_SECONDS = 1.5
"""A first packet that was dropped is sent again after a second: two were tried by then."""


class GuestStack:
    """``address`` and ``gateway`` are the attachment's."""

    def __init__(self, namespace: int, attachment: NetworkAttachment) -> None:
        assert attachment.guest is not None
        self._namespace = namespace
        self.address = attachment.guest.address
        self.gateway = attachment.guest.gateway

    @contextmanager
    def inside(self) -> Iterator[None]:
        with entered(self._namespace):
            yield

    def socket(self, kind: socket.SocketKind) -> socket.socket:
        with self.inside():
            return socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)

    async def connect(self, address: str, port: int, seconds: float = _PATIENCE_SECONDS) -> socket.socket:
        """Raises TimeoutError, OSError."""
        connection = self.socket(socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().sock_connect(connection, (address, port))
        except BaseException:
            connection.close()
            raise
        return connection

    async def reaches(self, address: str, port: int) -> bool:
        """Whether a connection can be opened. False takes a while: what is forbidden is dropped."""
        try:
            (await self.connect(address, port, _CLOSED_SECONDS)).close()
        except (TimeoutError, OSError):
            return False
        return True

    async def ask(
        self, name: str, kind: str = "A", *, server: str = "", stream: bool = False, seconds: float = _PATIENCE_SECONDS
    ) -> dns.message.Message:
        """``server``: in place of the gateway. Raises TimeoutError."""
        query = dns.message.make_query(name, kind, use_edns=0)
        wire, loop = query.to_wire(), asyncio.get_running_loop()
        async with asyncio.timeout(seconds):
            with self.socket(socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as connection:
                await loop.sock_connect(connection, (server or self.gateway, 53))
                if not stream:
                    await loop.sock_sendall(connection, wire)
                    return dns.message.from_wire(await loop.sock_recv(connection, 65535))
                await loop.sock_sendall(connection, len(wire).to_bytes(2) + wire)
                received = b""
                while len(received) < 2 or len(received) < 2 + int.from_bytes(received[:2]):
                    piece = await loop.sock_recv(connection, 65535)
                    if not piece:
                        raise EOFError
                    received += piece
                return dns.message.from_wire(received[2:])

    async def addresses_of(self, name: str) -> list[str]:
        answer = await self.ask(name)
        return sorted(each.address for rrset in answer.answer if rrset.rdtype == dns.rdatatype.A for each in rrset)


@contextlib.asynccontextmanager
async def guest_stack(
    lab: NetworkLab, sandbox_id: str, lease: int, policy: NetworkPolicy = OPEN_POLICY
) -> AsyncIterator[GuestStack]:
    """A slot of this policy with a guest on it; the slot stays."""
    driver = lab.driver()
    attachment = await driver.ensure_slot(sandbox_id, lease, policy)
    async with contextlib.AsyncExitStack() as stack:
        outside = await stack.enter_async_context(driver.opened(sandbox_id))
        assert outside is not None and attachment.guest is not None
        os.set_blocking(outside, False)
        process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        wait_for_sleep(process)
        namespace = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, namespace)
        with entered(namespace):
            tap.create_persistent(_CARD)
            inside = tap.open_existing(_CARD)
            stack.callback(os.close, inside)
            for command in (
                f"link set {_CARD} address {attachment.mac_address} mtu 1400",
                "link set lo up",
                f"link set {_CARD} up",
                f"address add {attachment.guest.address}/{attachment.guest.prefix_length} dev {_CARD}",
                f"route add default via {attachment.guest.gateway}",
            ):
                subprocess.run(["ip", *command.split()], check=True)
        loop = asyncio.get_running_loop()
        for source, target in ((outside, inside), (inside, outside)):
            loop.add_reader(source, _copy_frames, source, target)
            stack.callback(loop.remove_reader, source)
        yield GuestStack(namespace, attachment)


def _copy_frames(source: int, target: int) -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(64):
            frame = os.read(source, 65536 + 64)
            # A card that is not up yet takes none.
            with contextlib.suppress(OSError):
                os.write(target, frame)
