"""``python -m atelier.network_holder.keeper``: keeps an ordinary user's namespaces while network holders come and go.

What root has under a name in the file system an ordinary user has only as long as a process holds it. This process stays
outside of the namespaces, since only from there ``pasta`` can be started, and sockets made that reach this machine's own
nameservers. It is started by ``keeper_client`` and ends when it is told to, or by itself when nobody has asked for
long and no machine holds a TAP. What it has started ends with it, however it ends.

Requests and answers are packets of JSON; operations: describe, is_in_use,
set_uplink, remove_uplink, make_socket, end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any, cast

import atelier
from atelier.host import command
from atelier.host.bound_processes import BoundProcess, start_bound
from atelier.host.files import lock_folder
from atelier.model.errors import AlreadyRunningError, AtelierError, HostError
from atelier.model.layout import RunLayout, check_socket_path
from atelier.network_holder.names import NetworkNames
from atelier.telemetry.logs import configure

_logger = logging.getLogger("atelier.network_keeper")

PACKET_MAX_BYTES = 4096
_LOCK_NAME = "network-keeper.lock"
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "sleep", "infinity")
_LOOK_SECONDS = 30.0
_MAX_BACKOFF_SECONDS = 5.0
_NOISE = "Failed to send"
"""pasta's words of a system log that is not there."""
_PASTA = (
    *("pasta", "--foreground", "--quiet", "--stderr", "--ipv4-only", "--config-net"),
    # What it offers beside a way out: its own answers to guests, and this machine's ports, loopback among them.
    *("--no-map-gw", "--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra"),
    *("--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"),
)


class _Options(argparse.Namespace):
    run_dir: Path
    installation: str
    linger_seconds: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m atelier.network_holder.keeper", description="Atelier's network.")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run directory: the socket lies here")
    parser.add_argument("--installation", required=True, help="the installation's id")
    parser.add_argument("--linger-seconds", type=float, default=600, help="how long to stay when nobody needs it")
    options = parser.parse_args(arguments, namespace=_Options())
    configure("INFO", "line")
    os.umask(0o077)
    layout = RunLayout(options.run_dir)
    try:
        with lock_folder(layout.root / _LOCK_NAME):
            asyncio.run(_keep(layout, NetworkNames(options.installation, "br0"), options.linger_seconds))
    except AlreadyRunningError:
        # Two holders were quick; one keeper is enough.
        return 0
    except (AtelierError, OSError) as error:
        _logger.error("%s", error)
        return 1
    return 0


async def _keep(layout: RunLayout, names: NetworkNames, linger_seconds: float) -> None:
    keeper = Keeper(names, linger_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, keeper.end.set)
    try:
        await keeper.open()
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(keeper.serve(layout.network_keeper_socket))
            watching = tasks.create_task(keeper.watch())
            await keeper.end.wait()
            serving.cancel()
            watching.cancel()
    finally:
        await keeper.close()
    _logger.info("the network keeper has ended")


@dataclass(slots=True)
class _Uplink:
    address: IPv4Interface
    gateway: IPv4Address
    task: asyncio.Task[None]
    pasta: BoundProcess | None = None
    problem: str = ""


@dataclass
class Keeper:
    """``end`` is set when its time has come."""

    names: NetworkNames
    linger_seconds: float
    end: asyncio.Event = field(default_factory=asyncio.Event)
    _anchor: BoundProcess | None = None
    _anchor_task: asyncio.Task[None] | None = None
    _namespaces: tuple[int, int] | None = None
    _uplink: _Uplink | None = None
    _connections: set[socket.socket] = field(default_factory=lambda: set[socket.socket]())

    async def open(self) -> None:
        """Make the namespaces. Raises HostError (``no_user_namespaces``)."""
        anchor = await self._start_anchor(_UNSHARE)
        user, net = (os.open(f"/proc/{anchor.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("user", "net"))
        self._namespaces = user, net
        self._anchor_task = asyncio.create_task(self._keep_anchor(anchor))
        _logger.info("enter the sandboxes' network by: nsenter --preserve-credentials -U -n -t %s", anchor.pid)

    async def close(self) -> None:
        await self._remove_uplink()
        if self._anchor_task is not None:
            self._anchor_task.cancel()
            await asyncio.gather(self._anchor_task, return_exceptions=True)
        if self._anchor is not None:
            await self._anchor.end()
        for descriptor in self._namespaces or ():
            os.close(descriptor)

    # --- the namespaces -----------------------------------------------------------------------------------------------

    async def _start_anchor(self, arguments: tuple[str, ...]) -> BoundProcess:
        """A process inside, by whose number pasta and people find the namespaces."""
        self._anchor = anchor = await start_bound(arguments)
        ended = asyncio.create_task(anchor.wait())
        try:
            while not _is_sleeping(anchor.pid):
                await asyncio.wait([ended], timeout=0.005)
                if ended.done():
                    raise HostError(
                        f"this user may not make namespaces: {anchor.words.strip() or 'without a word'}",
                        code="no_user_namespaces",
                        hint="atelier doctor says how to allow it; or ATELIER_NETWORK=closed",
                    )
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)
        return anchor

    async def _keep_anchor(self, anchor: BoundProcess) -> None:
        while True:
            await anchor.wait()
            anchor = await self._start_anchor((*self._inside(), "sleep", "infinity"))

    def _inside(self) -> tuple[str, ...]:
        assert self._namespaces is not None
        user, net = (f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self._namespaces)
        return ("nsenter", "--preserve-credentials", f"--user={user}", f"--net={net}")

    async def _is_in_use(self) -> bool:
        """Whether a machine holds a TAP there."""
        shown = await command.run([*self._inside(), "ip", "-json", "link", "show"], package_hint="iproute2")
        links = cast("list[dict[str, Any]]", json.loads(shown.stdout))
        return any(self.names.is_tap(link["ifname"]) and "LOWER_UP" in link["flags"] for link in links)

    async def watch(self) -> None:
        """End it when it is needed by nobody."""
        loop = asyncio.get_running_loop()
        needed_at = loop.time()
        while loop.time() - needed_at < self.linger_seconds:
            await asyncio.sleep(min(_LOOK_SECONDS, self.linger_seconds))
            if self._connections or await self._is_in_use():
                needed_at = loop.time()
        _logger.info("nobody has needed the sandboxes' network for %g s", self.linger_seconds)
        self.end.set()

    # --- the way out --------------------------------------------------------------------------------------------------

    async def _set_uplink(self, address: IPv4Interface, gateway: IPv4Address) -> None:
        await self._remove_uplink()
        self._uplink = _Uplink(address, gateway, asyncio.create_task(self._keep_pasta(address, gateway)))

    async def _remove_uplink(self) -> None:
        if self._uplink is not None:
            self._uplink.task.cancel()
            await asyncio.gather(self._uplink.task, return_exceptions=True)
            if self._uplink.pasta is not None:
                await self._uplink.pasta.end()
            self._uplink = None

    async def _keep_pasta(self, address: IPv4Interface, gateway: IPv4Address) -> None:
        backoff = 0.2
        loop = asyncio.get_running_loop()
        while True:
            assert self._anchor is not None
            assert self._uplink is not None
            link = self.names.uplink_home
            place = (
                "--address",
                str(address.ip),
                "--netmask",
                str(address.network.prefixlen),
                "--gateway",
                str(gateway),
            )
            started_at = loop.time()
            try:
                pasta = self._uplink.pasta = await start_bound(
                    [*_PASTA, "--ns-ifname", link, *place, str(self._anchor.pid)]
                )
                status = await pasta.wait()
                said = [line for line in pasta.words.splitlines() if line.strip() and not line.startswith(_NOISE)]
                self._uplink.problem = f"pasta ended with status {status}: {said[-1] if said else 'without a word'}"
            except AtelierError as error:
                self._uplink.problem = str(error)
            _logger.warning("%s; starting it again", self._uplink.problem)
            if loop.time() - started_at > 2 * _MAX_BACKOFF_SECONDS:
                backoff = 0.2
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def serve(self, path: Path) -> None:
        check_socket_path(path)
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as clients:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listening:
                listening.bind(str(fresh))
                listening.listen(16)
                fresh.rename(path)
                try:
                    while True:
                        connection, _ = await loop.sock_accept(listening)
                        clients.create_task(self._serve_client(connection))
                finally:
                    path.unlink(missing_ok=True)

    async def _serve_client(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        self._connections.add(connection)
        try:
            with connection, contextlib.suppress(OSError):
                while packet := await loop.sock_recv(connection, PACKET_MAX_BYTES):
                    answer, descriptors = await self._answer(packet)
                    try:
                        socket.send_fds(connection, [json.dumps(answer).encode()], descriptors)
                    finally:
                        for descriptor in descriptors:
                            os.close(descriptor)
        finally:
            self._connections.discard(connection)

    async def _answer(self, packet: bytes) -> tuple[dict[str, Any], list[int]]:
        """With descriptors to send and to close."""
        try:
            request = cast("dict[str, Any]", json.loads(packet))
            match request["operation"]:
                case "describe":
                    return self._describe(), [os.dup(descriptor) for descriptor in self._namespaces or ()]
                case "is_in_use":
                    return {"ok": True, "in_use": await self._is_in_use()}, []
                case "set_uplink":
                    address, gateway = IPv4Interface(request["address"]), IPv4Address(request["gateway"])
                    await self._set_uplink(address, gateway)
                case "remove_uplink":
                    await self._remove_uplink()
                case "make_socket":
                    return {"ok": True}, [_make_socket(request["family"], request["kind"])]
                case "end":
                    self.end.set()
                case _:
                    return {"ok": False, "message": "unknown operation"}, []
        except (ValueError, KeyError, TypeError, OSError, AtelierError) as error:
            return {"ok": False, "message": f"{type(error).__name__}: {error}"}, []
        return {"ok": True}, []

    def _describe(self) -> dict[str, Any]:
        uplink = self._uplink
        return {
            "ok": True,
            "version": atelier.__version__,
            "address": str(uplink.address) if uplink else "",
            "problem": uplink.problem if uplink else "",
        }


def _is_sleeping(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "sleep"
    except OSError:
        return False


def _make_socket(family: object, kind: object) -> int:
    """Of the internet protocols only: the holder has no business with others here."""
    if family not in (socket.AF_INET, socket.AF_INET6) or kind not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        raise ValueError("neither TCP nor UDP")
    return socket.socket(socket.AddressFamily(family), socket.SocketKind(kind) | socket.SOCK_NONBLOCK).detach()


if __name__ == "__main__":
    sys.exit(main())
