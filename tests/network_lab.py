"""A host, an internet and a network holder in namespaces of the test's own: nothing of this machine's is touched.

::

    guests (this process, on their TAPs) -- bridge [home] -- pair or pasta -- [host] wan -- eth0 [internet]

Host and internet are namespaces of two sleeping processes; root's home lies below a /run/netns that only the host's mount
namespace has, an ordinary user's is held by a keeper. All of it vanishes with the processes, however the test ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from ipaddress import IPv4Network
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from tests.forked_programs import ForkedProgram
from tests.vm.ordinary_user import ORDINARY_USER

from atelier.drivers.network.bridge import BridgeNetwork
from atelier.host.namespaces import entered
from atelier.model.address_plan import AddressPlan
from atelier.model.layout import DataLayout, RunLayout

INSTALLATION = "test"
_OF_PACKETS = re.compile(r"(set (?:asking|flows) \{[^}]*?)\n\t\telements = \{[^}]*\}")
"""Elements that come and go with what guests send."""
BRIDGE = "br0"
HOST_ADDRESS = "198.51.100.2"
HOST_ADDRESS_V6 = "2001:db8:5::2"
NEIGHBOUR_OF_HOST = "198.51.100.1"
OTHER_HOST_ADDRESS = "203.0.113.77"
LATER_ADDRESS = "203.0.113.79"
"""The internet's at first."""
FRESH_HOST_ADDRESS = "203.0.113.78"
"""Not at first."""
INTERNET = "203.0.113.9"
ELSEWHERE = "192.0.2.9"
"""In the internet too."""
NAMESERVER = "10.1.53.53"
"""In a private network, as a home router is."""
METADATA = "169.254.169.254"
PRIVATE = ("192.168.77.7", "172.16.77.7", "10.1.77.7", "100.127.77.7")
PUBLISHED_PORT = 8080

_UNSHARE = ("unshare", "--net", "--mount", "--propagation", "private")
_REPOSITORY = Path(__file__).parents[1]
_PREPARE_MOUNTS = "mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns"
_AS_ORDINARY_USER = (
    *("setpriv", f"--reuid={ORDINARY_USER}", f"--regid={ORDINARY_USER}", "--clear-groups", "--no-new-privs"),
    *("env", "HOME=/nonexistent"),
)


class Home(StrEnum):
    """Who holds the network, and where: root in a namespace, an ordinary user in one, root in the host's own."""

    ROOT = "root"
    USER = "user"
    HOST = "host"


@cache
def why_no_lab(home: Home = Home.ROOT) -> str:
    """Words for a skip; empty where a lab can be made. Tried once."""
    programs = ("ip", "nft", "unshare", "nsenter", *(["pasta"] if home is Home.USER else []))
    missing = [each for each in programs if shutil.which(each) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    script = (
        "set -e; ip link add bridge0 type bridge; ip tuntap add tap0 mode tap; ip link set tap0 master bridge0;"
        "ip link add veth0 type veth peer name veth1; bridge link set dev tap0 isolated on; nft add table netdev x;"
        "nft 'add chain netdev x c { type filter hook ingress device tap0 priority 0; }'; mkdir -p /run/netns;"
        "mount -t tmpfs tmpfs /run/netns"
    )
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script], capture_output=True, text=True
    )
    if probe.returncode != 0:
        return f"no namespaces with bridge, TAP and nftables: {probe.stderr.strip()}"
    if home is Home.USER:
        words = [*_AS_ORDINARY_USER, "unshare", "--user", "--map-root-user", "--net", "true"]
        probe = subprocess.run(words, capture_output=True, text=True)
        if probe.returncode != 0:
            return f"no namespaces for ordinary users: {probe.stderr.strip()}"
    return ""


@dataclass
class NetworkLab:
    folder: Path
    host: subprocess.Popen[bytes]
    internet: subprocess.Popen[bytes]
    home: Home = Home.ROOT
    holder: ForkedProgram | None = None
    installation: str = INSTALLATION
    run: RunLayout = field(init=False)
    data: DataLayout = field(init=False)

    def __post_init__(self) -> None:
        self.run = RunLayout(self.folder / "run")
        self.data = DataLayout(self.folder)

    def follow_manager(self, data_dir: Path, run_dir: Path) -> None:
        """From now on the home is that of a manager which runs in the lab's host."""
        self.data = DataLayout(data_dir)
        (socket_path,) = run_dir.glob("*/network.sock")
        self.run = RunLayout(socket_path.parent)
        with closing(sqlite3.connect(f"file:{self.data.database}?mode=ro", uri=True)) as database:
            (self.installation,) = database.execute(
                "SELECT value FROM settings WHERE name = 'installation_id'"
            ).fetchone()

    @property
    def plan_file(self) -> Path:
        return self.data.network_plan

    @property
    def plan(self) -> AddressPlan:
        return AddressPlan(IPv4Network(json.loads(self.plan_file.read_text())["subnet"]))

    @property
    def log(self) -> Path:
        """The holder's."""
        return self.folder / "holder.log"

    @property
    def resolv_conf(self) -> Path:
        return self.folder / "resolv.conf"

    def set_nameservers(self, *addresses: str) -> None:
        """Of the host."""
        fresh = self.resolv_conf.with_suffix(".new")
        fresh.write_text("".join(f"nameserver {address}\n" for address in addresses))
        fresh.rename(self.resolv_conf)

    def driver(self) -> BridgeNetwork:
        return BridgeNetwork(self.run.network_socket)

    def in_host(self, *command: str, check: bool = True) -> str:
        return _run(["nsenter", "--target", str(self.host.pid), "--net", "--mount", *command], check)

    def set_forwarding(self, on: bool) -> None:
        self.in_host("sh", "-c", f"echo {int(on)} >/proc/sys/net/ipv4/ip_forward")

    @property
    def home_namespace(self) -> str:
        if self.home is Home.ROOT:
            return f"/proc/{self.host.pid}/root/run/netns/at-{self.installation}"
        if self.home is Home.HOST:
            return f"/proc/{self.host.pid}/ns/net"
        folder = f"/proc/{self.keeper}/fd"
        own = os.readlink(f"/proc/{self.host.pid}/ns/net")
        return next(
            f"{folder}/{number}"
            for number in os.listdir(folder)
            if (shown := os.readlink(f"{folder}/{number}")).startswith("net:[") and shown != own
        )

    @property
    def keeper(self) -> int:
        """The process that keeps an ordinary user's home."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(self.run.network_keeper_socket))
            return struct.unpack("iii", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]

    def as_owner(self) -> tuple[str, ...]:
        """The words before a command by which it runs as whoever holds the network."""
        return _AS_ORDINARY_USER if self.home is Home.USER else ()

    def forked_words(self, words: Sequence[str]) -> list[str]:
        """As which a forked program is ``python -m WORDS`` in the host, run by whoever holds the network."""
        user = ORDINARY_USER if self.home is Home.USER else 0
        return ["tests.program_in_lab", str(self.host.pid), str(user), *words]

    def in_home(self, *command: str, check: bool = True) -> str:
        return _run(
            ["nsenter", "--target", str(self.host.pid), "--mount", f"--net={self.home_namespace}", *command], check
        )

    def flush_rules(self) -> None:
        """As a stranger does: all of the home's, and those of ours on the host, where others' are too."""
        if self.home is not Home.HOST:
            self.in_home("nft", "flush", "ruleset")
        if self.home is not Home.USER:
            self.in_host("nft", "delete", "table", "inet", f"atelier_{self.installation}")
        if self.home is Home.HOST:
            self.in_host("nft", "delete", "table", "netdev", f"atelier_{self.installation}")

    def in_internet(self, *command: str) -> str:
        return _run(["nsenter", "--target", str(self.internet.pid), "--net", *command], check=True)

    @contextmanager
    def inside(self, place: str) -> Iterator[None]:
        """This thread in the namespace ``host``, ``home`` or ``internet``."""
        processes = {"host": self.host, "internet": self.internet}
        # What is forked later, for others too, must not begin there.
        ensure_running()
        path = self.home_namespace if place == "home" else f"/proc/{processes[place].pid}/ns/net"
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with entered(descriptor):
                yield
        finally:
            os.close(descriptor)

    def start_keeper(self, *options: str) -> None:
        """Before the holder does."""
        self._make_run_directory()
        arguments = ["--run-dir", str(self.run.root), "--installation", INSTALLATION, *options]
        words = ["nsenter", "--target", str(self.host.pid), "--net", "--mount", *self.as_owner(), sys.executable]
        subprocess.Popen([*words, "-m", "atelier.network_holder.keeper", *arguments], stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not self.run.network_keeper_socket.exists():
            assert time.monotonic() < deadline, "the keeper does not start"
            time.sleep(0.02)

    def _make_run_directory(self) -> None:
        self.run.root.mkdir(exist_ok=True)
        if self.home is Home.USER:
            for folder in (self.folder, self.run.root):
                os.chown(folder, ORDINARY_USER, ORDINARY_USER)

    def start_holder(
        self,
        *options: str,
        program: Sequence[str] = ("atelier.network_holder",),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``program``: a module's name, and the arguments that stand before the holder's. Raises RuntimeError with the holder's
        last words when it ends instead of answering."""
        self._make_run_directory()
        arguments = ["--run-dir", self.run.root, "--plan-file", self.plan_file, "--installation", INSTALLATION]
        # A predecessor that was killed has left it.
        self.run.network_socket.unlink(missing_ok=True)
        with self.log.open("ab") as output:
            self.holder = ForkedProgram(
                [
                    *self.forked_words([*program, *map(str, arguments)]),
                    *("--bridge-name", BRIDGE, "--resolv-conf", str(self.resolv_conf), *options),
                    *(["--home", "host"] if self.home is Home.HOST else []),
                ],
                environment={**os.environ, **(environment or {})},
                folder=_REPOSITORY,
                output=output,
                errors=output,
            )
        deadline = time.monotonic() + 60
        while not self.run.network_socket.exists():
            if self.holder.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.02)

    def ask(self, operation: str, **arguments: object) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self.run.network_socket))
            connection.sendall(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
            return json.loads(connection.makefile().readline())

    def stop_holder(self) -> None:
        """The process alone: the home stays."""
        if self.holder is not None:
            self.holder.send_signal(signal.SIGTERM)
            self.holder.wait(60)
            self.holder = None
            # A child of its own that was just being executed still has the lock for a moment.
            with suppress(FileNotFoundError), self.run.network_lock.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)

    def close_home(self) -> None:
        """With all that is in it. The holder says so, and ends after that."""
        assert self.ask("close")["ok"]
        assert self.holder is not None
        assert self.holder.wait(60) == 0
        self.stop_holder()

    def state(self) -> dict[str, str]:
        """Everything in host and home that a slot could leave behind."""
        return {
            "links": _names_and_addresses(self.in_home("ip", "-br", "link")),
            "entries": self.in_home("bridge", "fdb", "show"),
            "rules": _OF_PACKETS.sub(r"\1", self.in_home("nft", "list", "ruleset")),
            "host links": _names_and_addresses(self.in_host("ip", "-br", "link")),
            "host rules": _OF_PACKETS.sub(r"\1", self.in_host("nft", "list", "ruleset")),
            "namespaces": self.in_host("ip", "netns"),
        }


@contextmanager
def network_lab(folder: Path, home: Home = Home.ROOT, *, shown: tuple[Path, ...] = ()) -> Iterator[NetworkLab]:
    """Host and internet, connected; no holder yet. ``shown``: folders that an ordinary user needs to see there."""
    prepare = [_PREPARE_MOUNTS]
    if home is Home.USER:
        prepare += [*_open_to_everybody(Path(sys.base_prefix), Path(sys.prefix), _REPOSITORY, folder, *shown)]
    host = subprocess.Popen(
        [*_UNSHARE, "sh", "-c", " && ".join([*prepare, "exec sleep infinity"])],
        stdin=subprocess.DEVNULL,
    )
    internet = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL)
    lab = NetworkLab(folder, host, internet, home)
    try:
        wait_for_sleep(host)
        wait_for_sleep(internet)
        _connect(lab)
        # The kernel tells of the carrier a moment later: what is compared afterwards is to be as it stays.
        deadline = time.monotonic() + 10
        while "NO-CARRIER" in lab.in_host("ip", "-br", "link", "show", "dev", "wan"):
            assert time.monotonic() < deadline, "the lab's host has no carrier"
            time.sleep(0.01)
        lab.set_nameservers(NAMESERVER)
        yield lab
    finally:
        lab.stop_holder()
        with suppress(FileNotFoundError, ConnectionRefusedError):
            os.kill(lab.keeper, signal.SIGTERM)
        for process in (host, internet):
            process.kill()
            process.wait()


def _open_to_everybody(*folders: Path) -> Iterator[str]:
    """Commands by which an ordinary user reaches these folders, which may lie below folders that are closed to him, and
    finds /dev/net/tun as Debian makes it."""
    yield "umask 022; mount -t tmpfs tmpfs /mnt && mknod -m 666 /mnt/tun c 10 200 && mount --bind /mnt/tun /dev/net/tun"
    closed = {
        folder: ancestor
        for folder in dict.fromkeys(folders)
        if (ancestor := next((each for each in reversed(folder.parents) if not each.stat().st_mode & 1), None))
    }
    for number, folder in enumerate(closed):
        yield f"mkdir /mnt/{number} && mount --bind {folder} /mnt/{number}"
    for ancestor in sorted(set(closed.values())):
        yield f"mount -t tmpfs -o mode=755 tmpfs {ancestor}"
    for number, folder in enumerate(closed):
        yield f"mkdir -p {folder} && mount --bind /mnt/{number} {folder}"


def _connect(lab: NetworkLab) -> None:
    # Milliseconds between two words of what is refused: tables follow each other faster than by a second.
    settings = ["echo 20 >/proc/sys/net/ipv4/icmp_ratelimit"]
    lab.in_host(
        *_at_once(
            f"link add wan type veth peer name eth0 netns {lab.internet.pid}",
            "link set lo up",
            "link set wan up mtu 1400",
            f"address add {HOST_ADDRESS}/24 dev wan",
            f"address add {HOST_ADDRESS_V6}/64 dev wan nodad",
            f"address add {OTHER_HOST_ADDRESS}/32 dev lo",
            f"route add default via {NEIGHBOUR_OF_HOST}",
            settings=[
                *settings,
                # As systemd sets it: pasta pings in the user's name.
                "echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range",
                f"echo {int(lab.home is not Home.USER)} >/proc/sys/net/ipv4/ip_forward",
            ],
        )
    )
    lab.in_internet(
        *_at_once(
            "link set lo up",
            "link set eth0 up",
            f"address add {NEIGHBOUR_OF_HOST}/24 dev eth0",
            *(
                f"address add {address}/32 dev lo"
                for address in (INTERNET, ELSEWHERE, LATER_ADDRESS, NAMESERVER, METADATA, *PRIVATE)
            ),
            settings=settings,
        )
    )
    # A port that the host publishes from behind it, as Docker does.
    lab.in_host(
        "nft",
        f"table ip published {{ chain in {{ type nat hook prerouting priority dstnat;"
        f" ip daddr {OTHER_HOST_ADDRESS} udp dport {PUBLISHED_PORT} dnat to {INTERNET}; }}; }}",
    )


def _at_once(*of_ip: str, settings: Sequence[str]) -> tuple[str, ...]:
    """A command that does what these commands of ip's and then of a shell do."""
    lines = "\n".join(of_ip)
    return "sh", "-c", "\n".join(["set -e", f"ip -batch - <<'END'\n{lines}\nEND", *settings])


def wait_for_sleep(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process.pid}/comm").read_text().strip() != "sleep":
        assert process.poll() is None and time.monotonic() < deadline, "a namespace could not be made"
        time.sleep(0.005)


def _names_and_addresses(links: str) -> str:
    """Without their carriers, which come a moment later."""
    return "\n".join(" ".join(line.split()[0:3:2]) for line in links.splitlines())


def _run(command: list[str], check: bool) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}{done.stdout}")
    return done.stdout
