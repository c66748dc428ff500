"""An emulated host that ``atelier host init`` has made a production host: the packages that it wants, its configuration,
the commands that tests give it."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import tarfile
import time
from collections.abc import Callable
from typing import Any

from tests.host.emulated_host import LVM_DISK, PYTHON, EmulatedHost, Outcome
from tests.host.guest_files import unpack_guest_files

HOST = f"{PYTHON} -P -m atelier.cli host"
GROUP, BRIDGE = "sandboxes", "sandbr0"
CONFIG = f"""
[storage]
volume_group = "{GROUP}"
disk_overcommit = 10
[network]
bridgeName = "{BRIDGE}"
[host]
storage_device = "{LVM_DISK}"
"""
SERVICES = ("atelier-network", "atelier-gateway", "atelier-manager")
DATA, CACHE = "/var/lib/atelier/data", "/var/lib/atelier/cache"

_INIT_SECONDS = 1500.0
_SANDBOX_SECONDS = 900.0


def prepare_bare_host(host: EmulatedHost) -> None:
    """An archive with the packages that the machine has not got, and a configuration."""
    index = ""
    for name in ("mmdebstrap", "uidmap"):
        content = _package(name)
        host.write(f"/srv/archive/{name}.deb", content)
        sha256 = hashlib.sha256(content).hexdigest()
        index += f"{_control(name)}Filename: ./{name}.deb\nSize: {len(content)}\nSHA256: {sha256}\n\n"
    host.write("/srv/archive/Packages", index)
    host.write("/etc/apt/sources.list", "deb [trusted=yes] file:/srv/archive ./\n")
    host.write("/root/host.toml", CONFIG)


def make_production_host(host: EmulatedHost) -> None:
    """``atelier host init``, and the files that sandboxes are made of."""
    prepare_bare_host(host)
    host.run(f"{HOST} init --config /root/host.toml --yes", seconds=_INIT_SECONDS)
    host.run(unpack_guest_files(CACHE, "atelier"), seconds=_INIT_SECONDS)


def _package(name: str) -> bytes:
    """A Debian package with nothing in it: the machine has no archive at hand."""

    def member(file: str, content: bytes) -> bytes:
        head = f"{file:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) % 2)

    def packed(files: dict[str, bytes]) -> bytes:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as archive:
            for path, content in files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return data.getvalue()

    parts = (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", packed({"./control": _control(name).encode()})),
        ("data.tar.gz", packed({})),
    )
    return b"!<arch>\n" + b"".join(member(file, content) for file, content in parts)


def _control(name: str) -> str:
    return (
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
        "Description: stands for the one of the archive\n"
    )


class Operator:
    """Works on the host as user ``atelier``, with the command line."""

    def __init__(self, host: EmulatedHost) -> None:
        self.host = host

    def run(self, *words: str, check: bool = True, seconds: float = _SANDBOX_SECONDS) -> Outcome:
        said = shlex.join(words)
        script = f"cd / && ATELIER_DATA_DIR={DATA} {PYTHON} -P -m atelier.cli {said} </dev/null"
        return self.host.run(script, user="atelier", seconds=seconds, check=check)

    def state_of(self, name: str) -> str:
        return str(self.find(name)["state"])

    def find(self, name: str) -> dict[str, Any]:
        return json.loads(self.run("get", name, "--json").out)

    def names(self) -> list[str]:
        return sorted(each["name"] for each in json.loads(self.run("ls", "--json").out))

    def wait_for_state(self, name: str, wanted: str) -> None:
        found = ""

        def is_reached() -> bool:
            nonlocal found
            found = self.state_of(name)
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
        return self.host.run("pgrep -x qemu-system-x86 || true").out.split()

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
        time.sleep(1)
