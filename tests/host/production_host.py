"""An emulated host that ``atelier host init`` has made a production host: the packages that it wants, its configuration,
the commands that tests give it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tests.host.emulated_host import FIRECRACKER, LVM_DISK, PYTHON, EmulatedHost, Outcome, program_words
from tests.host.guest_files import unpack_guest_files

GROUP, BRIDGE = "sandboxes", "sandbr0"
CONFIG = f"""
[storage]
volume_group = "{GROUP}"
disk_overcommit = 20
[network]
bridgeName = "{BRIDGE}"
[host]
storage_device = "{LVM_DISK}"
"""
SERVICES = ("atelier-network", "atelier-gateway", "atelier-manager")
DATA, CACHE = "/var/lib/atelier/data", "/var/lib/atelier/cache"
_VARIABLES = {"ATELIER_DATA_DIR": DATA}
SMALL = ("--memory", "192M")
"""Of every sandbox here; a template of this size is there."""

Vmm = Literal["qemu", "firecracker"]
_PROCESSES: dict[Vmm, str] = {"qemu": "qemu-system-x86", "firecracker": "firecracker"}

_INIT_SECONDS = 1500.0
_SANDBOX_SECONDS = 900.0

# What a package manager, services of others and the clock write by themselves is nobody's change.
_STATE = r"""
dpkg-query -W -f '${Package} ${db:Status-Status}\n'
ip -brief link | awk '{print $1}'
nft list ruleset
sysctl net.ipv4.ip_forward
cat /etc/passwd /etc/group /etc/subuid
vgs --noheadings; lvs --noheadings; wipefs /dev/vdb
systemctl list-unit-files --no-legend | grep -i atelier | grep -v test-agent || true
find /etc /usr/local /var/lib/atelier /run/atelier* /dev/atelier -not -path '/etc/lvm/archive*' -not -path '/etc/lvm/backup*' \
    -not -path '/etc/lvm/devices*' -not -name 'passwd-' -not -name 'group-' \
    -not -name 'subuid-' -not -name 'subgid-' -not -name 'shadow*' -not -name 'gshadow*' -not -name '.pwd.lock' \
    -not -name 'ld.so.cache' -type f -printf '%p %m %u:%g %s\n' 2>/dev/null | sort || true
"""


@dataclass(frozen=True, slots=True)
class Making:
    """How a bare machine became a production host: its state before, and what ``doctor`` said where init was cut off."""

    bare_state: str
    interrupted: str


def state_of_machine(host: EmulatedHost) -> str:
    """What Atelier could have changed of it, as text to compare."""
    return host.run(_STATE).out


def run_host(host: EmulatedHost, *words: str, check: bool = True) -> Outcome:
    """``atelier host``, as root."""
    return host.run_program("atelier.host_setup", *words, seconds=_INIT_SECONDS, check=check)


def prepare_bare_host(host: EmulatedHost) -> None:
    """An archive with the packages that the machine has not got, and a configuration."""
    index = ""
    for name in ("mmdebstrap", "uidmap"):
        content = _package(name)
        host.write(f"/srv/archive/{name}.deb", content)
        sha256 = hashlib.sha256(content).hexdigest()
        index += f"{_control(name)}Filename: ./{name}.deb\nSize: {len(content)}\nSHA256: {sha256}\n\n"
    host.write("/srv/archive/Packages", index)
    # The mirrors of its image cannot be reached, which takes minutes to find out.
    host.run("rm -f /etc/apt/sources.list.d/*")
    host.write("/etc/apt/sources.list", "deb [trusted=yes] file:/srv/archive ./\n")
    host.write("/root/host.toml", CONFIG)


def make_production_host(host: EmulatedHost) -> Making:
    """By an init that is killed twice and gone on with. Sandboxes are restored from a template; there is none yet."""
    prepare_bare_host(host)
    bare_state = state_of_machine(host)
    _cut_off_init(host, "make the thin pool", "--config", "/root/host.toml")
    _cut_off_init(host, "start atelier-network")
    interrupted = run_host(host, "doctor", check=False).out
    host.run(f"{PYTHON} -P -m atelier.cli host init --yes", seconds=_INIT_SECONDS)
    host.run(unpack_guest_files(CACHE, "atelier"), seconds=_INIT_SECONDS)
    make_template(Operator(host))
    return Making(bare_state, interrupted)


def make_firecracker_host(host: EmulatedHost) -> None:
    """A production host whose machines are QEMU's gets a Firecracker, as its administrator would do that."""
    host.run(f"sed -i '/^\\[host\\]/a firecracker = \"{FIRECRACKER}\"' /etc/atelier/atelier.toml")
    run_host(host, "init", "--yes")
    host.run("systemctl restart atelier-manager", seconds=_INIT_SECONDS)
    make_template(Operator(host, "firecracker"))


def make_template(operator: Operator) -> None:
    """A first sandbox, which boots; from what then is made in the background those after it are restored."""
    since = operator.host.run("date +%s").out.strip()
    operator.run("create", "--name", "first", *SMALL)
    operator.run("rm", "first")
    log = f"journalctl -u atelier-manager --since @{since} --no-pager -o cat"
    wait_until(lambda: "creates like it are restored" in operator.host.run(log).out, _SANDBOX_SECONDS)


def expect_services(host: EmulatedHost) -> None:
    """They run, not as root, and the manager may ask root's side."""
    for name in SERVICES:
        state = host.run(f"systemctl is-active {name}", check=False).out.strip()
        assert state == "active", host.run(f"journalctl -u {name} -n 40 --no-pager").out
        pid = host.run(f"systemctl show --property=MainPID --value {name}").out.strip()
        status = host.read(f"/proc/{pid}/status")
        assert "\nUid:\t0" not in status, f"{name} is not root's"
        if name == "atelier-manager":
            assert "NoNewPrivs:\t0" in status
    host.run("sudo -n -l -- /usr/local/sbin/atelier-privileged storage", user="atelier")
    assert BRIDGE in host.run("ip -brief link").out


def _cut_off_init(host: EmulatedHost, moment: str, *options: str) -> None:
    """Kill it when it says that it begins with ``moment``."""
    init = program_words("atelier.host_setup", "init", "--yes", *options)
    host.run(
        f"""{init} </dev/null >/dev/null 2>/root/progress & pid=$!
        until grep -q '{moment}.*\\.\\.\\.$' /root/progress; do kill -0 $pid; sleep 0.2; done
        fuser --silent --kill /root/progress || true""",
        seconds=_INIT_SECONDS,
    )


def _package(name: str) -> bytes:
    """A Debian package with a program of its name, that does nothing: the machine has no archive at hand."""

    def member(file: str, content: bytes) -> bytes:
        head = f"{file:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) % 2)

    def packed(files: dict[str, bytes]) -> bytes:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as archive:
            for path, content in files.items():
                entry = tarfile.TarInfo(path)
                entry.size, entry.mode = len(content), 0o755
                archive.addfile(entry, io.BytesIO(content))
        return data.getvalue()

    parts = (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", packed({"./control": _control(name).encode()})),
        ("data.tar.gz", packed({f"./usr/bin/{name}": b"#!/bin/sh\n"})),
    )
    return b"!<arch>\n" + b"".join(member(file, content) for file, content in parts)


def _control(name: str) -> str:
    return (
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
        "Description: stands for the one of the archive\n"
    )


class Operator:
    """Works on the host as user ``atelier``, with the command line. ``vmm``: whose machines the sandboxes are."""

    def __init__(self, host: EmulatedHost, vmm: Vmm = "qemu") -> None:
        self.host = host
        self.vmm = vmm

    def run(self, *words: str, check: bool = True, seconds: float = _SANDBOX_SECONDS) -> Outcome:
        return self.host.run_program(
            "atelier.cli", *words, user="atelier", variables=_VARIABLES, seconds=seconds, check=check
        )

    def begin(self, *words: str) -> None:
        """Returns while the command, which waits, is at it."""
        calling = program_words("atelier.cli", *words, user="atelier", variables=_VARIABLES)
        self.host.run(f"{calling} </dev/null >/dev/null 2>&1 & sleep 15")

    def read(self, path: str) -> Any:
        """What the API answers. A program of curl's, since this is asked again and again; and again where no manager
        serves just now."""
        key = json.loads(self.host.read(f"{DATA}/token.json"))["api_key"]
        patience = "--retry 60 --retry-delay 2 --retry-connrefused"
        asking = f"curl -sS --fail-with-body {patience} -H @- http://127.0.0.1:7420/api/v1/{path}"
        return json.loads(self.host.run(asking, given=f"Authorization: Bearer {key}\n".encode()).out)

    def state_of(self, name: str) -> str:
        return str(self.find(name)["state"])

    def find(self, name: str) -> dict[str, Any]:
        return self.read(f"sandboxes/{name}")

    def states(self) -> dict[str, str]:
        """Of all sandboxes, by name."""
        return {each["name"]: each["state"] for each in self.read("sandboxes")["items"]}

    def snapshot_state(self, name: str) -> str:
        return str(self.read(f"snapshots/{name}")["state"])

    def wait_for_state(self, name: str, wanted: str) -> None:
        found = ""

        def is_reached() -> bool:
            nonlocal found
            found = self.state_of(name)
            assert found != "failed" or wanted == "failed", self.find(name)
            return found == wanted

        try:
            wait_until(is_reached, _SANDBOX_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"{name} is {found}, not {wanted}: {self.log()}") from None

    def execute(self, name: str, script: str) -> str:
        return self.run("exec", name, "--", "sh", "-c", script).out

    def kill_manager(self) -> None:
        """By force; returns when the service manager has started another, and that serves."""
        before = self.manager_pid()
        self.host.run(f"kill -KILL {before}")
        self.wait_for_manager(before)

    def wait_for_manager(self, before: str = "0") -> None:
        def is_back() -> bool:
            active = self.host.run("systemctl is-active atelier-manager", check=False).out.strip()
            return active == "active" and self.manager_pid() not in ("0", before)

        wait_until(is_back, _SANDBOX_SECONDS)

    def manager_pid(self) -> str:
        return self.host.run("systemctl show --property=MainPID --value atelier-manager").out.strip()

    def vmm_pids(self) -> list[str]:
        """Of the machines that sandboxes run in."""
        return self.host.run(f"pgrep -x {_PROCESSES[self.vmm]} || true").out.split()

    def volumes(self) -> list[str]:
        listed = self.host.run(f"lvs --noheadings -o lv_name {GROUP}").out.split()
        return sorted(name for name in listed if name.startswith("at-"))

    def links(self) -> list[str]:
        """TAPs of sandboxes."""
        listed = self.host.run(f"ip -json link show master {BRIDGE}").out
        return [link["ifname"] for link in json.loads(listed or "[]")]

    def log(self) -> str:
        return self.host.run("journalctl -u atelier-manager -n 60 --no-pager -o cat").out


def wait_until(is_reached: Callable[[], bool], seconds: float) -> None:
    """Raises TimeoutError."""
    limit = time.monotonic() + seconds
    while not is_reached():
        if time.monotonic() > limit:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(2)
