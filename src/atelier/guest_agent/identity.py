"""Makes the guest who it is told to be: clock, kernel entropy, hostname, machine-id, SSH host keys.

Called by ``control`` on ``/init`` only, inside a guest, as root. Plain system calls and small files: spawning
``hostname`` or ``date`` costs a hundred times as much under software emulation.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Final

from atelier.guest_protocol.connect import ConnectError

MACHINE_ID_PATH: Final = "/etc/machine-id"
HOSTNAME_PATH: Final = "/etc/hostname"
HOSTS_PATH: Final = "/etc/hosts"
SSH_FOLDER: Final = "/etc/ssh"

# Source: Linux include/uapi/linux/random.h.
_RNDADDENTROPY: Final = 0x40085203
_RNDRESEEDCRNG: Final = 0x5207

_SSHD: Final = "/usr/sbin/sshd"
_SSH_KEYGEN: Final = "/usr/bin/ssh-keygen"
_HOST_KEY_DELAY_SECONDS: Final = 3.0


def set_clock(time_ns: int) -> None:
    """Step the wall clock to ``time_ns`` (ns since the epoch)."""
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)
    except OSError as error:
        raise _failed("set the clock", error) from None


def add_entropy(entropy: bytes) -> None:
    """Credit ``entropy`` to the kernel's pool and have its generator use it now."""
    import fcntl

    # struct rand_pool_info {int entropy_count (bits); int buf_size (bytes); __u32 buf[];}
    pool = struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy
    try:
        with open("/dev/urandom", "rb") as device:
            fcntl.ioctl(device, _RNDADDENTROPY, pool)
            fcntl.ioctl(device, _RNDRESEEDCRNG)
    except OSError as error:
        raise _failed("reseed the random generator", error) from None


def set_hostname(name: str) -> None:
    """Set the name, and in /etc/hostname and /etc/hosts (sudo looks it up there)."""
    try:
        socket.sethostname(name)
        _write_if_changed(HOSTNAME_PATH, f"{name}\n")
        _write_if_changed(HOSTS_PATH, hosts_with(_read(HOSTS_PATH), name))
    except OSError as error:
        raise _failed("set the hostname", error) from None


def hosts_with(hosts: str, name: str) -> str:
    """The text of /etc/hosts with ``name`` for 127.0.1.1, in place of what stood there; as Debian does."""
    lines = [line for line in hosts.splitlines() if line.split()[:1] != ["127.0.1.1"]]
    if not any(line.split()[:1] == ["127.0.0.1"] for line in lines):
        lines.insert(0, "127.0.0.1\tlocalhost")
    lines.append(f"127.0.1.1\t{name}")
    return "\n".join(lines) + "\n"


def set_machine_id(machine_id: str) -> None:
    """Write /etc/machine-id; a guest that was somebody else before, or has none yet, gets new SSH host keys."""
    try:
        before = _read(MACHINE_ID_PATH).strip()
        _write_if_changed(MACHINE_ID_PATH, f"{machine_id}\n")
    except OSError as error:
        raise _failed("set the machine-id", error) from None
    if os.access(_SSHD, os.X_OK) and os.access(_SSH_KEYGEN, os.X_OK):
        asyncio.get_running_loop().call_later(
            _HOST_KEY_DELAY_SECONDS, _ensure_host_keys, before not in ("", "uninitialized", machine_id)
        )


def _ensure_host_keys(is_somebody_else: bool) -> None:
    """Start ssh-keygen in the background. Only Ed25519: an RSA key takes an emulated CPU many seconds."""
    keys = list(Path(SSH_FOLDER).glob("ssh_host_*_key"))
    if keys and not is_somebody_else:
        return
    try:
        for key in keys:
            key.unlink(missing_ok=True)
            key.with_name(key.name + ".pub").unlink(missing_ok=True)
        command = [_SSH_KEYGEN, "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", f"{SSH_FOLDER}/ssh_host_ed25519_key"]
        pid = os.posix_spawn(command[0], command, {"PATH": "/usr/bin:/bin"}, setsid=True, setsigmask=())
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        print(f"guest agent: cannot make SSH host keys: {error}", file=sys.stderr, flush=True)
        return
    loop = asyncio.get_running_loop()

    def reap() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        os.waitpid(pid, os.WNOHANG)

    loop.add_reader(descriptor, reap)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""


def _write_if_changed(path: str, content: str) -> None:
    if _read(path) != content:
        Path(path).write_text(content, encoding="utf-8", errors="surrogateescape")


def _failed(what: str, error: OSError) -> ConnectError:
    return ConnectError("internal", f"cannot {what}: {error.strerror or error}")
