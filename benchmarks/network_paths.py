"""Two ways from a TAP to the same internet, a namespace: a sandbox's slot, and a bare TAP that is only routed.

::

    slot -- bridge, rules [home] -- pair -- rules, translation [host] -- pair -- [internet]
    bare TAP                           -- [router] --                    pair -- [internet]

And guests for their ends: the real one of a bare QEMU, and one without an emulator, whose speed is the host's kernel's.
Used by ``network_throughput``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path

from tests.network_lab import INTERNET, NetworkLab, network_lab

from atelier.drivers.network.addresses import mac_address_of
from atelier.host import tap
from atelier.host.namespaces import entered
from atelier.host.netlink import RouteSocket
from atelier.model.ids import new_sandbox_id
from atelier.model.machine import GuestAddress, NetworkAttachment
from benchmarks.bare_machine import Ingredients, bare_machine
from benchmarks.direct_channel import DirectChannel

_SCRIPTS = Path(__file__).parent
_INTERNET_INSIDE, _ROUTER_OUTSIDE, _ROUTER, _GUEST, _PREFIX = "198.18.0.1", "198.18.0.2", "198.18.1.1", "198.18.1.2", 24
"""Source: RFC 2544, addresses for benchmarks."""
_MTU = "1500"
_SET_OFFLOAD, _CHECKSUMS_AND_SEGMENTS = 0x400454D0, 0x1 | 0x2 | 0x4
"""Source: linux/if_tun.h, TUNSETOFFLOAD. Frames of up to 64 KiB without checksums pass, as between a VMM and its guest."""


@dataclass(frozen=True)
class NetworkPath:
    """``descriptor``: the guest's end, an open TAP. The guest asks for orders at ``listening``, in the internet."""

    name: str
    descriptor: int
    attachment: NetworkAttachment
    listening: socket.socket

    @property
    def guest(self) -> GuestAddress:
        assert self.attachment.guest is not None
        return self.attachment.guest

    @property
    def port(self) -> int:
        return self.listening.getsockname()[1]

    def setup_script(self, card: str) -> str:
        return (
            f"ip link set {card} address {self.attachment.mac_address} && ip link set {card} up && "
            f"ip address add {self.guest.address}/{self.guest.prefix_length} dev {card} && "
            f"ip route add default via {self.guest.gateway}"
        )


@contextlib.contextmanager
def network_paths(folder: Path) -> Generator[tuple[NetworkPath, NetworkPath]]:
    """(a slot, a bare TAP)."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(network_lab(folder))
        # The tests' way to the internet is narrow on purpose.
        lab.in_host("ip", "link", "set", "wan", "mtu", _MTU)
        lab.start_holder()
        ours, attachment = asyncio.run(_open_slot(lab))
        stack.callback(os.close, ours)
        bare = stack.enter_context(_bare_tap(lab))
        bare_attachment = NetworkAttachment(
            "tap", mac_address_of("benchmarkaaa"), GuestAddress(_GUEST, _PREFIX, _ROUTER, _ROUTER)
        )
        with lab.inside("internet"):
            listening = [stack.enter_context(socket.create_server((INTERNET, 0))) for _ in range(2)]
        yield (
            NetworkPath("slot", ours, attachment, listening[0]),
            NetworkPath("bare", bare, bare_attachment, listening[1]),
        )


async def _open_slot(lab: NetworkLab) -> tuple[int, NetworkAttachment]:
    sandbox_id = new_sandbox_id()
    attachment = await lab.driver().ensure_slot(sandbox_id, 0)
    async with lab.driver().opened(sandbox_id) as descriptor:
        assert descriptor is not None
        return os.dup(descriptor), attachment


@contextlib.contextmanager
def _namespace() -> Generator[int]:
    """The pid of a process that sleeps in a network namespace of its own."""
    process = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo there; exec sleep infinity"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("no network namespace can be made")
        yield process.pid
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _inside(pid: int) -> Generator[None]:
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        with entered(namespace):
            yield
    finally:
        os.close(namespace)


def _run_inside(pid: int, script: str) -> None:
    subprocess.run(["nsenter", "--target", str(pid), "--net", "sh", "-c", script], check=True, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def _bare_tap(lab: NetworkLab) -> Generator[int]:
    with _namespace() as router:
        lab.in_internet("ip", "link", "add", "bare", "type", "veth", "peer", "name", "out", "netns", str(router))
        lab.in_internet("ip", "address", "add", f"{_INTERNET_INSIDE}/24", "dev", "bare")
        lab.in_internet("ip", "link", "set", "bare", "up")
        lab.in_internet("ip", "route", "add", f"{_GUEST}/32", "via", _ROUTER_OUTSIDE)
        _run_inside(
            router,
            f"ip link set lo up && ip address add {_ROUTER_OUTSIDE}/24 dev out && ip link set out up && "
            f"ip route add default via {_INTERNET_INSIDE} && echo 1 >/proc/sys/net/ipv4/ip_forward",
        )
        with _inside(router):
            descriptor = _open_tap("guest", IPv4Interface((_ROUTER, _PREFIX)))
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _open_tap(name: str, address: IPv4Interface | None = None) -> int:
    tap.create_persistent(name)
    links = RouteSocket()
    try:
        link = links.get_link(name)
        if address is not None:
            links.ensure_address(link.index, address)
        links.set_up(link.index)
    finally:
        links.close()
    return tap.open_existing(name)


# --- guests -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def emulated_guest(path: NetworkPath, folder: Path, ingredients: Ingredients) -> Generator[None]:
    """QEMU, as a sandbox is run by it."""
    with bare_machine(folder, ingredients, network=path.attachment, network_descriptor=path.descriptor) as machine:
        channel = DirectChannel(machine.folder.guest_socket, token="")
        try:
            find_card = "card=$(ls /sys/class/net | grep -v '^lo$')"
            channel.run("/bin/sh", "-c", f"{find_card} && {path.setup_script('$card')}", user="root")
            script = (_SCRIPTS / "network_guest.py").read_text()
            channel.run("python3", "-c", script, INTERNET, str(path.port), user="root", background=True)
            yield
        finally:
            channel.close()


@contextlib.contextmanager
def plain_guest(path: NetworkPath) -> Generator[None]:
    """A namespace with a card, and two processes that carry frames between it and the path's TAP."""
    with contextlib.ExitStack() as stack:
        pid = stack.enter_context(_namespace())
        with _inside(pid):
            card = _open_tap("card")
        stack.callback(os.close, card)
        _run_inside(pid, path.setup_script("card"))
        for descriptor in (card, path.descriptor):
            fcntl.ioctl(descriptor, _SET_OFFLOAD, _CHECKSUMS_AND_SEGMENTS)
            os.set_blocking(descriptor, True)
        for source, target in ((card, path.descriptor), (path.descriptor, card)):
            relay = [sys.executable, "-I", "-S", str(_SCRIPTS / "tap_relay.py"), str(source), str(target)]
            stack.enter_context(_running(relay, pass_fds=(source, target)))
        guest = [sys.executable, "-I", str(_SCRIPTS / "network_guest.py"), INTERNET, str(path.port)]
        stack.enter_context(_running(["nsenter", "--target", str(pid), "--net", *guest]))
        yield


@contextlib.contextmanager
def _running(command: list[str], pass_fds: tuple[int, ...] = ()) -> Generator[None]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=pass_fds)
    try:
        yield
    finally:
        process.kill()
        process.wait()
