"""SSH into the guest: an sshd of its own for each connection that the host opens to ``GUEST_SSH_PORT``.

Called by ``channel``; no port of the guest's network leads here. The first line of such a stream is the public key that this
one connection trusts, in OpenSSH's form; what follows is SSH. So the guest keeps no key of the host's: what a snapshot
holds of one opens nothing. sshd reads the image's own configuration after what must hold, and the user's own
``authorized_keys`` are good, too. An image without sshd refuses the stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from atelier.guest_agent.spawn import DEFAULT_PATH
from atelier.guest_agent.state import AgentState

SSHD: Final = "/usr/sbin/sshd"
_IMAGE_CONFIGURATION: Final = "/etc/ssh/sshd_config"
_FOLDER: Final = Path("/run/atelier/ssh")
_SEPARATION_FOLDER: Final = Path("/run/sshd")
_KEY_LINE: Final = re.compile(rb"[a-z0-9@.-]{1,64} [A-Za-z0-9+/=]{1,12000}")
_LINE_MAX_BYTES: Final = 16 * 1024
_LINE_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02

# The first word counts where sshd finds two.
_SETTINGS: Final = """\
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AuthorizedKeysFile {keys} .ssh/authorized_keys
AllowTcpForwarding yes
AllowStreamLocalForwarding yes
AllowAgentForwarding yes
MaxSessions 500
UseDNS no
PrintMotd no
AcceptEnv LANG LC_* TZ COLORTERM TERM_PROGRAM TERM_PROGRAM_VERSION GIT_*
{environment}Include {image}
"""


async def connect(state: AgentState) -> socket.socket:
    """The socket (non-blocking) of a stream whose other end sshd will have, once it has said which key to trust.

    Raises ConnectionRefusedError where the image has no sshd, OSError."""
    if not os.access(SSHD, os.X_OK):
        raise ConnectionRefusedError("no sshd in this image")
    # The agent's own requests wait, too, while the guest stands still.
    await state.gate.opened()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    task = asyncio.get_running_loop().create_task(_serve(theirs, state))
    _serving.add(task)
    task.add_done_callback(_serving.discard)
    return ours


_serving: set[asyncio.Task[None]] = set()


async def _serve(theirs: socket.socket, state: AgentState) -> None:
    with theirs:
        try:
            key = await _read_key(theirs)
            theirs.setblocking(True)
            pid = _start(theirs.fileno(), _write_settings(key, state.environment))
        except (OSError, ValueError, TimeoutError) as error:
            print(f"ssh: {error}", file=sys.stderr)
            return
    await _reap(pid)


async def _read_key(theirs: socket.socket) -> bytes:
    """The first line, and not a byte more: the rest is sshd's."""
    theirs.setblocking(False)
    async with asyncio.timeout(_LINE_SECONDS):
        while True:
            try:
                seen = theirs.recv(_LINE_MAX_BYTES, socket.MSG_PEEK)
            except BlockingIOError:
                await asyncio.sleep(_POLL_SECONDS)
                continue
            line, end, _ = seen.partition(b"\n")
            if end:
                theirs.recv(len(line) + 1)
                break
            if not seen or len(seen) >= _LINE_MAX_BYTES:
                raise ValueError("the stream began with no key to trust")
            await asyncio.sleep(_POLL_SECONDS)
    if not _KEY_LINE.fullmatch(line):
        raise ValueError("the key to trust is no public key")
    return line


def _write_settings(key: bytes, environment: dict[str, str]) -> Path:
    """sshd's configuration for connections that trust ``key``: the same two files for the same key."""
    for folder, mode in ((_FOLDER, 0o755), (_SEPARATION_FOLDER, 0o755)):
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    name = hashlib.sha256(key).hexdigest()[:16]
    # Read by sshd with the rights of who logs in.
    keys = _write(_FOLDER / f"{name}.pub", key + b"\n", 0o644)
    variables = " ".join(_quote(f"{name}={value}") for name, value in environment.items() if _is_plain(value))
    settings = _SETTINGS.format(
        keys=keys, environment=f"SetEnv {variables}\n" if variables else "", image=_IMAGE_CONFIGURATION
    )
    if not os.path.exists(_IMAGE_CONFIGURATION):
        settings += "Subsystem sftp internal-sftp\n"
    # Closed to others: values may be secrets.
    return _write(_FOLDER / f"{name}.conf", settings.encode("utf-8", "surrogateescape"), 0o600)


def _is_plain(value: str) -> bool:
    return not {"\n", "\r"} & set(value)


def _quote(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write(path: Path, content: bytes, mode: int) -> Path:
    fresh = path.with_name(f"{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
    os.replace(fresh, path)
    return path


def _start(descriptor: int, settings: Path) -> int:
    return os.posix_spawn(
        SSHD,
        [SSHD, "-i", "-f", str(settings)],
        {"PATH": DEFAULT_PATH},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, descriptor, 0),
            (os.POSIX_SPAWN_DUP2, descriptor, 1),
            (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT),
    )


async def _reap(pid: int) -> None:
    """Wait until it has ended, so that no zombie stays."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    pidfd = os.pidfd_open(pid)
    try:
        loop.add_reader(pidfd, lambda: ended.done() or ended.set_result(None))
        await ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222  it has ended
