"""What mode ``local`` needs of a machine. Looks only: nothing is installed, started or changed.

Called by ``atelier doctor`` (through the manager's program, without a running manager).
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from atelier.host.files import free_bytes
from atelier.host.memory import memory_bytes
from atelier.model.errors import HostError
from atelier.model.layout import RunLayout, check_socket_path

_NEEDED_DISK_BYTES = 3 * 1024**3
_NEEDED_MEMORY_BYTES = 1024**3
_PROGRAMS = (
    ("qemu-system-x86_64", "qemu-system-x86", "to run sandboxes"),
    ("qemu-img", "qemu-utils", "to make their disks"),
    ("mmdebstrap", "mmdebstrap", "to build images"),
    ("mke2fs", "e2fsprogs", "to build images"),
    ("dpkg-deb", "dpkg", "to unpack the guest's kernel"),
    ("apt-get", "apt", "to fetch the guest's kernel and packages"),
    ("setpriv", "util-linux", "to confine the VMM"),
)
_UNPRIVILEGED_PROGRAMS = (("newuidmap", "uidmap", "to build images without root"),)


class CheckStatus(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """``remedy`` is empty when there is nothing to do."""

    name: str
    status: CheckStatus
    message: str
    remedy: str = ""


def check_machine(data_dir: Path, cache_dir: Path, run_dir: Path, listen: tuple[str, int]) -> list[CheckResult]:
    """All checks of mode ``local``, in the order in which a newcomer meets them."""
    return [
        _architecture(),
        *_programs(),
        _subordinate_ids(),
        _kvm(),
        _memory(),
        _disk("data folder", data_dir),
        _disk("cache folder", cache_dir),
        _socket_paths(run_dir),
        _port(*listen),
    ]


def _architecture() -> CheckResult:
    machine = platform.machine()
    if machine == "x86_64":
        return CheckResult("architecture", CheckStatus.OK, machine)
    return CheckResult(
        "architecture", CheckStatus.FAILED, f"this machine is {machine}", "use a machine with an x86_64 processor"
    )


def _programs() -> Iterator[CheckResult]:
    wanted = _PROGRAMS if os.geteuid() == 0 else _PROGRAMS + _UNPRIVILEGED_PROGRAMS
    for program, package, purpose in wanted:
        # sbin holds mke2fs, and is not in every user's PATH.
        found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
        if found:
            yield CheckResult(program, CheckStatus.OK, found)
        else:
            yield CheckResult(
                program,
                CheckStatus.FAILED,
                f"{program} is not installed; it is needed {purpose}",
                f"apt-get install {package}",
            )


def _subordinate_ids() -> CheckResult:
    name = "subordinate ids"
    if os.geteuid() == 0:
        return CheckResult(name, CheckStatus.OK, "not needed by root")
    user = _user_name()
    try:
        lines = [line.split(":") for line in Path("/etc/subuid").read_text().splitlines()]
    except FileNotFoundError:
        lines = []
    if any(line[0] in (user, str(os.geteuid())) and int(line[2]) >= 65536 for line in lines if len(line) == 3):
        return CheckResult(name, CheckStatus.OK, f"{user} has a range in /etc/subuid")
    return CheckResult(
        name,
        CheckStatus.FAILED,
        f"{user} has no range of 65536 ids in /etc/subuid; images cannot be built without root",
        f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
    )


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _kvm() -> CheckResult:
    """Only the door: whether KVM really boots a guest is found out by the probe when a sandbox is first started."""
    node = Path("/dev/kvm")
    if not node.exists():
        return CheckResult(
            "kvm",
            CheckStatus.WARNING,
            "there is no /dev/kvm: sandboxes run in software emulation, about ten times slower",
            "enable virtualization in the firmware, or use a host that offers nested virtualization",
        )
    if not os.access(node, os.R_OK | os.W_OK):
        return CheckResult(
            "kvm",
            CheckStatus.WARNING,
            "/dev/kvm may not be opened by this user: sandboxes run in software emulation",
            "add the user to the group kvm, then sign in again",
        )
    return CheckResult("kvm", CheckStatus.OK, "/dev/kvm can be opened; a test guest decides whether it is used")


def _memory() -> CheckResult:
    available = memory_bytes("MemAvailable")
    message = f"{available // 2**20} MiB available"
    if available >= _NEEDED_MEMORY_BYTES:
        return CheckResult("memory", CheckStatus.OK, message)
    return CheckResult(
        "memory", CheckStatus.WARNING, message, "a sandbox takes 512 MiB unless it is asked for less; free some"
    )


def _disk(name: str, folder: Path) -> CheckResult:
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = free_bytes(existing)
    message = f"{folder}: {free // 2**20} MiB free"
    if not os.access(existing, os.W_OK | os.X_OK):
        return CheckResult(name, CheckStatus.FAILED, f"{existing} cannot be written by this user", "choose another one")
    if free < _NEEDED_DISK_BYTES:
        return CheckResult(name, CheckStatus.WARNING, message, "images and disks take about 3 GiB; free some space")
    return CheckResult(name, CheckStatus.OK, message)


def _socket_paths(run_dir: Path) -> CheckResult:
    try:
        check_socket_path(RunLayout(run_dir).vmm_directory("a" * 12) / "channel.sock")
    except HostError as error:
        return CheckResult("run folder", CheckStatus.FAILED, error.message, error.hint)
    return CheckResult("run folder", CheckStatus.OK, str(run_dir))


def _port(host: str, port: int) -> CheckResult:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return CheckResult(
                "listen address",
                CheckStatus.WARNING,
                f"{host}:{port}: {error.strerror}",
                "is a manager running already? else set ATELIER_LISTEN to another address or port",
            )
    return CheckResult("listen address", CheckStatus.OK, f"{host}:{port} is free")
