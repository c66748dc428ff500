"""Network namespaces: made under a name, entered by a thread, left again. Used by the network holder and by checks.

A name is a bind mount below /run/netns, as ``ip netns`` makes it, so a namespace outlives the processes in it and an
administrator finds it (``ip netns exec NAME ...``). Source: ip-netns(8), setns(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Generator
from pathlib import Path

from atelier.host import command
from atelier.model.errors import HostError

_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_CAP_NET_ADMIN = 12
_NAMED = Path("/run/netns")
_PACKAGE = "iproute2"

_libc = ctypes.CDLL(None, use_errno=True)


def open_current() -> int:
    """A descriptor of the calling thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


async def ensure_named(name: str) -> int:
    """Have a namespace of this name, and open it."""
    path = _NAMED / name
    if not path.exists():
        await command.run(["ip", "netns", "add", name], package_hint=_PACKAGE)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with entered(descriptor):
            pass
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


async def ensure_named_absent(name: str) -> None:
    if (_NAMED / name).exists():
        await command.run(["ip", "netns", "delete", name], package_hint=_PACKAGE)


@contextlib.contextmanager
def entered(namespace: int) -> Generator[None]:
    """The calling thread in that namespace. Nothing may be awaited inside: other tasks would find themselves there."""
    before = open_current()
    try:
        enter(namespace)
        try:
            yield
        finally:
            enter(before)
    finally:
        os.close(before)


def enter(namespace: int) -> None:
    """Move the calling thread, and with it all threads and programs that it starts from now on. Where it is there already
    that takes no right."""
    current = open_current()
    try:
        is_there = os.path.sameopenfile(namespace, current)
    finally:
        os.close(current)
    if not is_there and _libc.setns(namespace, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise HostError(
            f"a network namespace cannot be entered: {os.strerror(number)}",
            code="network_refused",
            hint="this takes root; is the name below /run/netns a leftover? ip netns delete removes it",
        )


def may_change_network() -> bool:
    """Whether this process may make links and rules where it is: as root, or with the one capability (ambient, say).
    Source: capabilities(7), proc(5)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, mask = line.partition(":")
        if name == "CapEff":
            return bool(int(mask, 16) >> _CAP_NET_ADMIN & 1)
    return False


def enter_user(namespace: int) -> None:
    """Move this process, which must not have a second thread, into a user namespace that its user owns: it has all
    rights over that and over the network namespaces made there, and none beyond. There is no way back."""
    if _libc.setns(namespace, _CLONE_NEWUSER) != 0:
        number = ctypes.get_errno()
        raise HostError(f"a user namespace cannot be entered: {os.strerror(number)}", code="network_refused")


def prefix_for(namespace: int) -> list[str]:
    """The words before a command by which it runs in that namespace, as long as this process holds the descriptor."""
    return ["nsenter", f"--net=/proc/{os.getpid()}/fd/{namespace}"]


def write_setting(name: str, value: str, *, missing_ok: bool = False) -> None:
    """Set ``net.<name>`` (dots as slashes) in the calling thread's namespace. Raises HostError. ``missing_ok``: a kernel
    without it needs no setting."""
    path = Path("/proc/sys/net") / name
    if missing_ok and not path.exists():
        return
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        raise HostError(
            f"{path} cannot be set to {value}: {error.strerror}",
            code="network_refused",
            hint="is /proc/sys mounted read-only (in a container it often is)?",
        ) from error
