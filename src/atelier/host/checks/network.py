"""What the bridge network needs of a machine. Looks only: nothing is changed.

Called by ``atelier doctor`` and before the network holder is started.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from atelier.host.checks.local import CheckResult, CheckStatus
from atelier.host.netlink import RouteSocket
from atelier.host.nftables import is_installed
from atelier.model.address_plan import choose_plan
from atelier.model.errors import HostError

_NAME = "network"
_PACKAGES = {"ip": "iproute2", "nsenter": "util-linux"}


def check_bridge_network() -> list[CheckResult]:
    """Every one that fails is told; a single one where all is well."""
    if os.geteuid() != 0:
        return [
            _failed(
                "a bridge network can be made by root only as yet",
                "run the manager as root, or leave the network closed (ATELIER_NETWORK=closed)",
            )
        ]
    found = [*_programs(), *_forwarding_and_addresses()]
    return found or [CheckResult(_NAME, CheckStatus.OK, "sandboxes can have a bridge of their own")]


def _programs() -> Iterator[CheckResult]:
    for program, package in _PACKAGES.items():
        if shutil.which(program) is None:
            yield _failed(f"{program} is not installed, or not in PATH", f"apt-get install {package}")
    if not is_installed():
        yield _failed("libnftables is not installed", "apt-get install nftables")
    if not Path("/dev/net/tun").exists():
        yield _failed("there is no /dev/net/tun", "modprobe tun; in a container, pass the device in")


def _forwarding_and_addresses() -> Iterator[CheckResult]:
    links = RouteSocket()
    try:
        if not links.is_forwarding():
            yield _failed(
                "this machine forwards no packets (net.ipv4.ip_forward is 0)",
                "sysctl -w net.ipv4.ip_forward=1 (and in /etc/sysctl.d to keep it)",
            )
        try:
            choose_plan((route.network for route in links.routes()), 0)
        except HostError as error:
            yield _failed(error.message, error.hint)
    finally:
        links.close()


def _failed(message: str, remedy: str) -> CheckResult:
    return CheckResult(_NAME, CheckStatus.FAILED, message, remedy)
