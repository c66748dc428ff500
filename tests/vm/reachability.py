"""Whether a guest reaches ports of the host: listeners that note who came, and the guest's script that tries.

Run as a program (``open`` or ``restricted``, kernel, initramfs) it boots one guest inside the network namespace that it finds itself in, and prints what came as JSON.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.real_machines import INIT_PREPARES, with_init

from atelier.drivers.network.user import UserNetwork
from atelier.drivers.vmm.qemu_arguments import kernel_command_line, machine_arguments
from atelier.drivers.vmm.run_folder import RunFolder, opened_machine
from atelier.host.tsc import measure_tsc_khz
from atelier.model.machine import BootFiles

FINISHED = "EVERYTHING TRIED"
GUEST_LIMIT_SECONDS = 90
GATEWAYS = ("10.0.2.2", "10.0.2.3", "10.0.2.4", "fec0::2", "fec0::3")
"""Where QEMU's user network shows the host, its name server and its SMB server. Source: QEMU docs/system/devices/net.rst."""
NAMESPACE_ADDRESSES = ("192.0.2.77", "2001:db8::77")


class Listeners:
    """One port, TCP and UDP, on every address of both families; ``reached`` holds what clients said of themselves."""

    def __init__(self, stack: ExitStack) -> None:
        self.reached: set[str] = set()
        self._tcp4 = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
        self.port: int = self._tcp4.getsockname()[1]
        sockets = [self._tcp4]
        for family, kind in (
            (socket.AF_INET6, socket.SOCK_STREAM),
            (socket.AF_INET, socket.SOCK_DGRAM),
            (socket.AF_INET6, socket.SOCK_DGRAM),
        ):
            opened = stack.enter_context(socket.socket(family, kind))
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", self.port))
            if kind == socket.SOCK_STREAM:
                opened.listen()
            sockets.append(opened)
        for opened in sockets:
            serve = self._serve_tcp if opened.type == socket.SOCK_STREAM else self._serve_udp
            threading.Thread(target=serve, args=(opened,), daemon=True).start()

    def _serve_tcp(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(5)
                    self.reached.add(connection.recv(200).decode(errors="replace").strip() or "tcp somebody")
            except TimeoutError:
                self.reached.add("tcp somebody silent")
            except OSError:
                return

    def _serve_udp(self, listener: socket.socket) -> None:
        while True:
            try:
                datagram, _ = listener.recvfrom(2000)
            except OSError:
                return
            # A TFTP request: two bytes, the file's name, NUL. Source: RFC 1350.
            self.reached.add(datagram[2:].split(b"\0")[0].decode(errors="replace"))


@contextmanager
def listening() -> Iterator[Listeners]:
    with ExitStack() as stack:
        yield Listeners(stack)


def try_everything(targets: Sequence[str], port: int) -> str:
    """The guest's init: take the network's addresses, try each target by TCP and UDP, say so, end."""
    attempts = "\n".join(
        f'(echo "tcp {target}" | timeout 7 nc -w 6 {target} {port}) >/dev/null 2>&1 &\n'
        f'timeout 7 tftp -g -l /dev/null -r "udp {target}" {target} {port} >/dev/null 2>&1 &'
        for target in targets
    )
    return f"""{INIT_PREPARES}
# No search for doubles of the address: it could not be used while that lasts.
echo 0 >/proc/sys/net/ipv6/conf/eth0/dad_transmits
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip -6 addr add fec0::15/64 dev eth0
ip route add default via 10.0.2.2
ip -6 route add default via fec0::2
# The host's own loopback address, sent out by the network card instead of staying in the guest.
echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet
ip link set lo up
ip addr del 127.0.0.1/8 dev lo
ip route add 127.0.0.1/32 via 10.0.2.2 src 10.0.2.15
# Until the neighbours have found each other; on a network without IPv6 they never do.
for try in 1 2 3; do ping6 -c 1 -W 1 fec0::2 >/dev/null 2>&1 && echo 'IPV6 NEIGHBOUR FOUND' && break; done
{attempts}
nslookup -timeout=3 localhost 10.0.2.3 2>&1 | grep -q 'Name:' && echo 'NAME SERVER ANSWERED'
wait
ping -c 1 -W 2 10.0.2.2 >/dev/null && echo 'GATEWAY PINGED'
ip addr show eth0
ip -6 route
echo {FINISHED}
reboot -f
"""


def host_addresses() -> list[str]:
    told = json.loads(subprocess.check_output(["ip", "-j", "addr"]))
    return [
        entry["local"]
        for link in told
        for entry in link.get("addr_info", [])
        # A link-local address needs a zone, which the guest has not got.
        if entry.get("scope") != "link" and entry["local"] != "::1"
    ]


async def _boot_in_this_namespace(kernel: Path, initramfs: Path, restricted: bool) -> dict[str, object]:
    for command in (
        ["ip", "link", "set", "lo", "up"],
        *(["ip", "addr", "add", address, "dev", "lo"] for address in NAMESPACE_ADDRESSES),
    ):
        subprocess.run(command, check=True)
    network = await UserNetwork().ensure_slot("aaaaaaaaaaaa", 0)
    with tempfile.TemporaryDirectory(prefix="atelier-net-") as directory, listening() as listeners:
        targets = (*GATEWAYS, "127.0.0.1", *NAMESPACE_ADDRESSES)
        given = BootFiles(kernel, initramfs, tools=initramfs, kernel_release="", tools_id="")
        boot = with_init(given, try_everything(targets, listeners.port), Path(directory))
        folder = RunFolder(Path(directory))
        with opened_machine(folder, boot) as descriptors:
            arguments = machine_arguments(
                Path("/usr/bin/env"),
                "atelier-reachability",
                accelerator="tcg",
                vcpu_count=1,
                memory_mib=192,
                command_line=kernel_command_line("tcg", measure_tsc_khz()),
                descriptors=descriptors,
                network=network,
            )
            arguments[0] = "qemu-system-x86_64"
            if not restricted:
                place = arguments.index("user,id=network,restrict=on,ipv6=off")
                arguments[place] = "user,id=network,restrict=off"
            subprocess.run(
                arguments,
                pass_fds=descriptors.all,
                stdin=subprocess.DEVNULL,
                timeout=GUEST_LIMIT_SECONDS,
                check=True,
            )
        return {"reached": sorted(listeners.reached), "console": folder.console.read_text(errors="replace")}


if __name__ == "__main__":
    told = _boot_in_this_namespace(Path(sys.argv[2]), Path(sys.argv[3]), restricted=sys.argv[1] == "restricted")
    print(json.dumps(asyncio.run(told)))
