"""What the bridge network needs of a machine: found out by making one in a namespace that ends at once. Nothing of the
machine's own is changed.

Called by ``atelier doctor``, and by the manager to choose the network and before the network holder is started. Root's
network and an ordinary user's need different things.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from atelier.host.checks.local import CheckResult, CheckStatus
from atelier.host.netlink import RouteSocket
from atelier.host.nftables import is_installed
from atelier.model.address_plan import choose_plan
from atelier.model.errors import HostError

_NAME = "network"
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
"""sbin holds nft, and is not in every user's PATH."""
_PACKAGES = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux", "unshare": "util-linux"}
_PROBE_SECONDS = 20
_TUN = Path("/dev/net/tun")

_NAMESPACES = "namespaces"
_ROOTS_NAMESPACES = ("unshare", "--net", "--mount", "--propagation", "private")
_USERS_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net")
# Says what it is about to try: the last word names what failed, no word that there were no namespaces.
_PROBE = """
set -e
echo settings; echo 1 >/proc/sys/net/ipv4/ip_forward
echo bridge; ip link add name probe type bridge
echo tap; ip tuntap add name tap mode tap
echo port; ip link set dev tap master probe; ip link set dev tap type bridge_slave isolated on learning off
echo rules
nft 'table inet probe {
    set current { type ipv4_addr . mark; }
    chain forward { type filter hook forward priority filter; policy drop; ip saddr . ct mark @current accept; }
    chain leave { type nat hook postrouting priority srcnat; masquerade; }
}
table netdev probe { chain tap { type filter hook ingress device "tap" priority -500; policy drop; }; }'
"""
_ROOTS_PROBE = """
echo pair; ip link add name one type veth peer name two
echo names; mkdir -p /run/netns; mount -t tmpfs tmpfs /run/netns; ip netns add probe
"""
_REMEDIES = {
    "settings": "let /proc/sys/net be writable: in a container it is often mounted read-only",
    "bridge": "as root: modprobe bridge",
    "tap": "as root: modprobe tun",
    "port": "a kernel from 4.18 on is needed, for isolated ports of a bridge",
    "rules": "as root: modprobe nf_tables nft_chain_nat nft_masq nft_ct; a kernel from 5.10 on is needed",
    "pair": "as root: modprobe veth",
    "names": "run it where namespaces may be mounted (a container needs the capability SYS_ADMIN), or as an ordinary user",
}
_ALLOW_ROOT = "run it with the capabilities NET_ADMIN and SYS_ADMIN, or as an ordinary user"
_ALLOW_USERS = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
    ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=10000"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (or an AppArmor profile that allows userns)",
    ),
)
"""(setting below /proc/sys, the value that forbids, what allows it)."""


def check_bridge_network() -> list[CheckResult]:
    """Every one that fails is told; a single one where all is well."""
    as_root = os.geteuid() == 0
    found = [*_programs(as_root), *_tun_device(), *_forwarding_and_addresses(as_root)]
    if not found:
        found = list(_probe(as_root))
    return found or [CheckResult(_NAME, CheckStatus.OK, "sandboxes can have a bridge of their own, with the internet")]


def _programs(as_root: bool) -> Iterator[CheckResult]:
    for program, package in (_PACKAGES if as_root else {**_PACKAGES, "pasta": "passt"}).items():
        if shutil.which(program, path=_PATH) is None:
            yield _failed(f"{program} is not installed", f"apt-get install {package}")
    if not is_installed():
        yield _failed("libnftables is not installed", "apt-get install nftables")


def _tun_device() -> Iterator[CheckResult]:
    if not _TUN.exists():
        yield _failed(f"there is no {_TUN}", "as root: modprobe tun; in a container, pass the device in")
    elif not os.access(_TUN, os.R_OK | os.W_OK):
        yield _failed(
            f"this user may not open {_TUN}",
            f"as root: chmod 0666 {_TUN} (Debian's mode: a TAP is made by nobody without rights over a namespace)",
        )


def _forwarding_and_addresses(as_root: bool) -> Iterator[CheckResult]:
    links = RouteSocket()
    try:
        if as_root and not links.is_forwarding():
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


def _probe(as_root: bool) -> Iterator[CheckResult]:
    namespaces = _ROOTS_NAMESPACES if as_root else _USERS_NAMESPACES
    script = _PROBE + _ROOTS_PROBE if as_root else _PROBE
    try:
        done = subprocess.run(
            [*namespaces, "sh", "-c", script],
            env={"PATH": _PATH, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield _failed(
            f"a network for trial did not come up within {_PROBE_SECONDS} s", "look at the kernel's log: dmesg"
        )
        return
    if done.returncode != 0:
        step = (done.stdout.split() or [_NAMESPACES])[-1]
        reason = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        remedy = _REMEDIES[step] if step != _NAMESPACES else _ALLOW_ROOT if as_root else _how_to_allow_users()
        yield _failed(f"making a network for trial failed at its {step}: {reason}", remedy)


def _how_to_allow_users() -> str:
    for setting, forbids, remedy in _ALLOW_USERS:
        try:
            if (Path("/proc/sys") / setting).read_text().strip() == forbids:
                return f"as root: {remedy} (and in /etc/sysctl.d to keep it)"
        except OSError:
            continue
    return "allow this user to make user and network namespaces, or run the manager as root"


def _failed(message: str, remedy: str) -> CheckResult:
    return CheckResult(_NAME, CheckStatus.FAILED, message, remedy)
