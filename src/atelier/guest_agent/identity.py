"""Makes the guest who it is told to be: clock, kernel entropy, hostname, machine-id, SSH host keys.

Called by ``control`` on ``/init`` only, inside a guest, as root. Plain system calls and small files: spawning
``hostname`` or ``date`` costs a hundred times as much under software emulation.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any, Final

from atelier.guest_protocol.connect import ConnectError

MACHINE_ID_PATH: Final = "/etc/machine-id"
HOSTNAME_PATH: Final = "/etc/hostname"
HOSTS_PATH: Final = "/etc/hosts"
SSH_FOLDER: Final = "/etc/ssh"

# Source: Linux include/uapi/linux/random.h.
_RNDADDENTROPY: Final = 0x40085203
_RNDRESEEDCRNG: Final = 0x5207

_PRIVATE_KEY: Final = re.compile(
    "-----BEGIN OPENSSH PRIVATE KEY-----\n(?:[A-Za-z0-9+/=]{1,80}\n){1,200}-----END OPENSSH PRIVATE KEY-----\n"
)
_PUBLIC_KEY: Final = re.compile("ssh-ed25519 [A-Za-z0-9+/=]{1,200}(?: [ -~]{0,100})?")
_HOST_KEY: Final = f"{SSH_FOLDER}/ssh_host_ed25519_key"


class HostKey:
    """A checked ``hostKey`` object of ``/init``: an Ed25519 key in OpenSSH's own forms."""

    def __init__(self, fields: dict[str, Any]) -> None:
        private, public = fields.get("privateKey"), fields.get("publicKey")
        if not isinstance(private, str) or not _PRIVATE_KEY.fullmatch(private):
            raise ConnectError("invalid_argument", "hostKey: privateKey must be a key in OpenSSH's form")
        if not isinstance(public, str) or not _PUBLIC_KEY.fullmatch(public):
            raise ConnectError("invalid_argument", "hostKey: publicKey must be a line of OpenSSH's for Ed25519")
        self.private = private
        self.public = f"{public}\n"


def set_clock(time_ns: int) -> None:
    """Step the wall clock to ``time_ns`` (ns since the epoch), as a boot needs it."""
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)
    except OSError as error:
        raise _failed("set the clock", error) from None


def add_entropy(entropy: bytes) -> None:
    """Credit ``entropy`` to the kernel's pool and have its generator use it now. (Newer kernels do so in a moment, by a
    worker of theirs; a guest whose processes stand still is thawed by a later request.)"""
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


def become(machine_id: str, host_key: HostKey | None) -> None:
    """Write /etc/machine-id. A guest that was somebody else before, or has no SSH host key yet, gets ``host_key`` in
    place of all that it has; else it keeps its own, so that people who know it by its key go on knowing it."""
    try:
        before = _read(MACHINE_ID_PATH).strip()
        if host_key is not None and os.path.isdir(SSH_FOLDER):
            present = list(Path(SSH_FOLDER).glob("ssh_host_*_key"))
            if not present or before != machine_id:
                _set_host_key(host_key, present)
        # Last: a guest that is cut off before is still somebody else, and gets its key at the next try.
        _write_if_changed(MACHINE_ID_PATH, f"{machine_id}\n")
    except OSError as error:
        raise _failed("set machine-id and SSH host key", error) from None


def _set_host_key(key: HostKey, present: list[Path]) -> None:
    for path in present:
        if str(path) != _HOST_KEY:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.pub").unlink(missing_ok=True)
    for name, content, mode in ((_HOST_KEY, key.private, 0o600), (f"{_HOST_KEY}.pub", key.public, 0o644)):
        descriptor = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(content)
        os.replace(f"{name}.new", name)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""


def _write_if_changed(path: str, content: str) -> None:
    """In place: a file that was emptied first has its blocks allocated and written out as it is closed, which ext4 does to
    spare people a zero-length file, and which keeps whoever waits for a name waiting for the disk."""
    if _read(path) == content:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb") as file:
        file.write(content.encode("utf-8", "surrogateescape"))
        file.truncate()


def _failed(what: str, error: OSError) -> ConnectError:
    return ConnectError("internal", f"cannot {what}: {error.strerror or error}")
