"""Two real guests on the bridge of a real manager, which runs in a host and with an internet of the test's own.

The packets that a guest may try are ``tests/contract/test_network_packets.py``'s; here it is shown that real machines,
a real manager and its end go with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Network
from pathlib import Path

import httpx
import pytest
from tests.contract.packet_stage import Guest, Stage
from tests.contract.packet_table import try_table
from tests.footprint import processes_naming
from tests.forked_programs import ForkedProgram, run_forked
from tests.network_lab import (
    HOST_ADDRESS,
    INTERNET,
    METADATA,
    NAMESERVER,
    OTHER_HOST_ADDRESS,
    Home,
    NetworkLab,
    network_lab,
    why_no_lab,
)
from tests.real_machines import NO_QEMU, REPOSITORY, get_base_image, get_boot_files
from tests.running_manager import WITH_TEMPLATES, wait_until
from tests.vm.guest_card import guest_card
from tests.vm.ordinary_user import ORDINARY_USER

from atelier import Sandbox
from atelier.config.settings import load_settings
from atelier.model.address_plan import AddressPlan
from atelier.model.image import Image
from atelier.model.machine import BootFiles
from atelier.model.states import UNDER_WAY, SandboxState
from atelier.schemas.processes import RunResult

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

_SERVE = (
    "import http.server, sys;"
    "handler = type('H', (http.server.BaseHTTPRequestHandler,), {"
    "'do_GET': lambda s: (s.send_response(200), s.end_headers(), s.wfile.write(s.client_address[0].encode())),"
    "'log_message': lambda *a: None});"
    "http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), handler).serve_forever()"
)


class BridgedManager:
    """A manager in the lab's host, run by who holds the lab's network, asked through its command line there, and where
    much is asked without a program for each question."""

    def __init__(self, lab: NetworkLab, folder: Path, choice: str = "bridge") -> None:
        self.lab = lab
        self.data = folder / "data"
        self.run_dir = folder / "run"
        self.log = folder / "manager.log"
        self.variables = {
            "ATELIER_DATA_DIR": str(self.data),
            "ATELIER_RUN_DIR": str(self.run_dir),
            "ATELIER_NETWORK": choice,
            # Where there is a template, guests are restored; test_a_choice_that_was_changed starts one that boots.
            **WITH_TEMPLATES,
            **({"ATELIER_NETWORK_HOME": "host"} if lab.home is Home.HOST else {}),
            **({"ATELIER_CACHE_DIR": str(_copy_cache(folder))} if lab.home is Home.USER else {}),
        }
        if lab.home is Home.USER:
            os.chown(folder, ORDINARY_USER, ORDINARY_USER)
        self.process = self.start()

    def start(self) -> ForkedProgram:
        with self.log.open("ab") as log:
            self.process = ForkedProgram(
                self.lab.forked_words(["atelier.manager"]),
                environment={**os.environ, **self.variables},
                folder=REPOSITORY,
                output=log,
                errors=log,
            )
        deadline = time.monotonic() + 60
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return self.process

    def answers(self) -> bool:
        try:
            with self.lab.inside("host"):
                return httpx.get(f"{self.token['api_url']}/health", timeout=5, verify=False).status_code == 200
        except (OSError, ValueError, httpx.HTTPError):
            return False

    @property
    def token(self) -> dict[str, str]:
        """Where it is asked, and with what."""
        return json.loads((self.data / "token.json").read_text())

    @contextmanager
    def sandbox(self, name: str) -> Iterator[Sandbox]:
        """From a client in the lab's host."""
        token = self.token
        with (
            self.lab.inside("host"),
            Sandbox.connect(name, api_url=token["api_url"], api_key=token["api_key"]) as connected,
        ):
            yield connected

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(120)

    def end_everything(self) -> None:
        """Also where a test failed nothing may stay: machines, gateway and network outlive a manager."""
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        self.run("atelier.manager", "--down", "destroy")

    def choose(self, network: str) -> None:
        """For the next start."""
        self.variables["ATELIER_NETWORK"] = network

    def run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """``python -m WORDS`` in the lab's host."""
        environment = {**os.environ, **self.variables}
        return run_forked(self.lab.forked_words(words), environment=environment, folder=REPOSITORY, timeout=300)

    def cli(self, *arguments: str) -> None:
        done = self.run("atelier.cli", *arguments)
        assert done.returncode == 0, (done.stdout + done.stderr).decode() + self.log.read_text()

    def piped(self, *arguments: str) -> list[str]:
        """The words of a command line as a program of its own, for who speaks with it."""
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        place = ["nsenter", "--target", str(self.lab.host.pid), "--net", "--mount", *self.lab.as_owner()]
        return [*place, "env", *variables, sys.executable, "-m", "atelier.cli", *arguments]

    def create(self, *names: str) -> None:
        """They begin at once, and come to their addresses in this order."""
        token = self.token
        with self.lab.inside("host"), ExitStack() as stack:
            made: list[Sandbox] = []
            for name in names:
                box = Sandbox.create(
                    name=name, memory_mib=256, wait=False, api_url=token["api_url"], api_key=token["api_key"]
                )
                stack.callback(box.close)
                made.append(box)
            for box in made:
                wait_until(lambda box=box: box.refresh().state not in UNDER_WAY, 300)
                assert box.state is SandboxState.RUNNING, self.log.read_text()

    def restart(self, name: str) -> None:
        with self.sandbox(name) as box:
            box.stop()
            box.start()

    @property
    def plan(self) -> AddressPlan:
        return AddressPlan(IPv4Network(json.loads((self.data / "network.json").read_text())["subnet"]))

    def in_guest(self, name: str, script: str) -> RunResult:
        with self.sandbox(name) as box:
            return box.run(script, user="root")

    def check_card(self, name: str, lease: int) -> None:
        """The guest agent has set it as the manager said."""
        shown = self.in_guest(name, "ip -brief address show dev eth0; ip route; cat /etc/resolv.conf").stdout
        assert f" UP {self.plan.address_of(lease)}/{self.plan.subnet.prefixlen}" in " ".join(shown.split()), shown
        assert f"default via {self.plan.gateway} dev eth0" in shown
        assert f"nameserver {self.plan.gateway}\n" in shown

    def fetch(self, name: str, *addresses: str) -> str:
        """What servers there answer, all asked at once; empty if none is reached."""
        asking = [f"curl --silent --max-time 4 http://{address}/ &" for address in addresses]
        done = self.in_guest(name, "\n".join([*asking, "wait"]))
        assert done.exit_code == 0, done.stderr
        return done.stdout


def _copy_cache(folder: Path) -> Path:
    """What boots, as an ordinary user's own. Building it takes root or a range of subordinate ids."""

    async def find() -> tuple[BootFiles, Image]:
        return await get_boot_files(), await get_base_image()

    boot, image = asyncio.run(find())
    cache = load_settings().cache_dir
    copied = [*(cache / "kernel").iterdir(), *(cache / "tools").glob("*.json"), boot.tools]
    copied += [image.path, image.path.with_suffix(".json")]
    templates = cache.glob("templates/*/template.json")
    for source in (*copied, *(each.parent for each in templates)):
        target = folder / "cache" / source.relative_to(cache)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A template may go meanwhile; one that is not whole is not used.
        copying = ["cp", "--archive", "--sparse=always", str(source), str(target)]
        subprocess.run(copying, check=source in copied)
    subprocess.run(["chown", "--recursive", f"{ORDINARY_USER}:{ORDINARY_USER}", str(folder / "cache")], check=True)
    return folder / "cache"


@contextmanager
def serving(lab: NetworkLab, pid: int, address: str, port: int) -> Iterator[None]:
    server = subprocess.Popen(
        ["nsenter", "--target", str(pid), "--net", sys.executable, "-c", _SERVE, address, str(port)],
        stdin=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        server.kill()
        server.wait()


@contextmanager
def naming(lab: NetworkLab, heard: Path) -> Iterator[None]:
    """The host's nameserver, and how the host knows of it; the names it was asked for come to stand in ``heard``."""
    records = json.dumps({name: [f"60 A {INTERNET}"] for name in ("allowed.example.com.", "denied.example.com.")})
    program = [sys.executable, "-m", "tests.nameserver", NAMESERVER, records]
    with heard.open("wb") as output:
        server = subprocess.Popen(
            ["nsenter", "--target", str(lab.internet.pid), "--net", *program],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=output,
        )
    try:
        lab.in_host("mount", "--bind", str(lab.resolv_conf), "/etc/resolv.conf")
        yield
    finally:
        server.kill()
        server.wait()


# The third home differs from root's in its rules alone, which test_network_packets tries.
@pytest.mark.parametrize("home", [Home.ROOT, Home.USER])
def test_two_guests_have_the_internet_and_nothing_else(home: Home) -> None:
    if missing := why_no_lab(home):
        pytest.skip(missing)
    # Short: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="atl-") as name, network_lab(Path(name), home) as lab:
        before = lab.in_host("ip", "-br", "link"), lab.in_host("nft", "list", "ruleset"), lab.in_host("ip", "netns")
        manager = BridgedManager(lab, Path(name))
        try:
            heard = Path(name, "heard")
            with (
                naming(lab, heard),
                serving(lab, lab.internet.pid, "0.0.0.0", 80),
                serving(lab, lab.host.pid, "0.0.0.0", 80),
            ):
                try_guests(manager)
                try_names(manager, heard)
            manager.cli("rm", "--yes", "one", "two")
            manager.end()
        finally:
            manager.end_everything()
        assert (
            lab.in_host("ip", "-br", "link"),
            lab.in_host("nft", "list", "ruleset"),
            lab.in_host("ip", "netns"),
        ) == before
        assert not list(Path(name, "run").glob("*/*"))
        # The keeper ends with the holder, a moment later.
        wait_until(lambda: processes_naming(name) == [])


def try_guests(manager: BridgedManager) -> None:
    manager.create("one", "two")
    for lease, name in enumerate(("one", "two")):
        manager.check_card(name, lease)
    plan = manager.plan
    for name in ("one", "two"):
        assert manager.fetch(name, INTERNET) == HOST_ADDRESS, "translated to the host's address"
    gateway, neighbour = str(plan.gateway), str(plan.address_of(1))
    closed = (HOST_ADDRESS, OTHER_HOST_ADDRESS, gateway, str(plan.uplink_host), METADATA)
    assert manager.fetch("one", *closed) == ""
    assert manager.in_guest("one", f"ping -c 2 -W 2 {neighbour}").exit_code != 0
    assert manager.in_guest("two", f"ping -c 2 -W 2 {plan.address_of(0)}").exit_code != 0

    # A guest's own kernel sends the same in each home; each home's rules are tried by test_network_packets.
    if manager.lab.home is Home.ROOT:
        try_packets(manager)

    # The manager dies; network and guests go on, and the next one finds them.
    manager.end(signal.SIGKILL)
    manager.start()
    assert manager.fetch("one", INTERNET) == HOST_ADDRESS

    # The first takes the second's place: it gains nothing, and the second loses nothing.
    mac = manager.in_guest("two", "cat /sys/class/net/eth0/address").stdout.strip()
    theft = (
        f"ip link set eth0 down; ip link set eth0 address {mac}; ip address flush dev eth0; "
        f"ip address add {neighbour}/16 dev eth0; ip link set eth0 up; ip route replace default via {gateway}; "
    )
    stolen = manager.in_guest("one", theft + f"curl --silent --max-time 4 http://{INTERNET}/")
    assert stolen.exit_code != 0
    assert manager.fetch("two", INTERNET) == HOST_ADDRESS


def try_packets(manager: BridgedManager) -> None:
    """Each of the table's, sent by a guest's own kernel."""
    lab, plan = manager.lab, manager.plan
    lab.follow_manager(manager.data, manager.run_dir)
    with ExitStack() as stack:
        cards: list[Guest] = []
        for lease, name in enumerate(("one", "two")):
            mac = manager.in_guest(name, "cat /sys/class/net/eth0/address").stdout.strip()
            words = manager.piped("exec", name, "--", "sudo")
            cards.append(stack.enter_context(guest_card(words, mac, str(plan.address_of(lease)), str(plan.gateway))))
        stage = Stage(lab, *cards, fenced=True)
        stage.open(stack)
        assert try_table(stage) == []


def try_names(manager: BridgedManager, heard: Path) -> None:
    """With the resolver library and the network stack of a real guest."""
    assert manager.fetch("two", "denied.example.com") == HOST_ADDRESS, "the whole internet"
    manager.cli("network", "deny", "two", "--unlisted")
    manager.cli("network", "allow", "two", "allowed.example.com")
    before = heard.read_text()
    # The address alone opens nothing.
    assert manager.fetch("two", INTERNET, "denied.example.com", "stolen.allowed.example.com") == ""
    assert heard.read_text() == before, "nobody heard of it"
    assert manager.fetch("two", "ALLOWED.example.com") == HOST_ADDRESS
    assert heard.read_text() == before + "allowed.example.com.\n"
    assert manager.fetch("two", INTERNET) == HOST_ADDRESS, "opened by its name"
    manager.cli("network", "deny", "two", "--all")
    assert manager.fetch("two", INTERNET, "allowed.example.com") == ""


def test_a_choice_that_was_changed_disturbs_nobody() -> None:
    if missing := why_no_lab():
        pytest.skip(missing)
    with tempfile.TemporaryDirectory(prefix="atl-") as name, network_lab(Path(name)) as lab:
        before = lab.in_host("ip", "-br", "link"), lab.in_host("nft", "list", "ruleset"), lab.in_host("ip", "netns")
        manager = BridgedManager(lab, Path(name))
        try:
            with serving(lab, lab.internet.pid, "0.0.0.0", 80):
                manager.create("one")
                manager.end()
                manager.choose("closed")
                manager.start()
                assert manager.fetch("one", INTERNET) == HOST_ADDRESS, "it runs, and keeps what it has"
                manager.restart("one")
                assert manager.fetch("one", INTERNET) == ""
                manager.end()
                manager.choose("auto")
                manager.start()
                assert manager.fetch("one", INTERNET) == "", "it runs, and keeps what it has"
                manager.restart("one")
                assert manager.fetch("one", INTERNET) == HOST_ADDRESS
            manager.cli("rm", "--yes", "one")
            manager.end()
        finally:
            manager.end_everything()
        assert (
            lab.in_host("ip", "-br", "link"),
            lab.in_host("nft", "list", "ruleset"),
            lab.in_host("ip", "netns"),
        ) == before
        # The keeper ends with the holder, a moment later.
        wait_until(lambda: processes_naming(name) == [])


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    if missing := why_no_lab():
        pytest.skip(missing)
    with network_lab(tmp_path) as lab:
        lab.set_forwarding(False)
        with pytest.raises(AssertionError, match=r"sysctl -w net\.ipv4\.ip_forward=1"):
            BridgedManager(lab, tmp_path)
        assert lab.in_host("ip", "netns") == ""
        assert os.path.exists(tmp_path / "data" / "atelier.db")
