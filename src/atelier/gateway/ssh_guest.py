"""Streams to the sshd of a guest, by way of its channel; and the SSH client that speaks to it.

Called by ``ssh_connection``. The guest agent starts an sshd per stream, which trusts the one key that the stream begins with:
for a relayed connection that of the gateway's own for this sandbox, made anew with each gateway and kept nowhere; for a
spliced one the visitor's. What a guest says is hostile: all of it stays within its own connection.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, Final, cast

import asyncssh

from atelier.guest_protocol import GUEST_SSH_PORT
from atelier.model.errors import AtelierError, GuestUnreachableError, PreconditionError

WINDOW_BYTES: Final = 2 * 1024 * 1024
PACKET_BYTES: Final = 32 * 1024

_CONNECT_SECONDS: Final = 30.0
_ANSWER_MAX_BYTES: Final = 64
_LOGIN_SECONDS: Final = 60.0
"""An emulated guest on a busy machine takes its time for a handshake."""
_KEYS_MAX: Final = 4096


async def open_stream(channel: Path, key_line: str) -> socket.socket:
    """A connected socket on which a guest's sshd speaks, which trusts ``key_line``. Raises GuestUnreachableError,
    PreconditionError (``no_sshd``)."""
    loop = asyncio.get_running_loop()
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await loop.sock_connect(stream, str(channel))
            await loop.sock_sendall(stream, f"CONNECT {GUEST_SSH_PORT}\n{key_line}\n".encode())
            answer = b""
            # Byte by byte: what follows is SSH's.
            while not answer.endswith(b"\n") and len(answer) < _ANSWER_MAX_BYTES:
                piece = await loop.sock_recv(stream, 1)
                if not piece:
                    break
                answer += piece
        if not answer.startswith(b"OK "):
            raise _refusal(answer.decode(errors="replace").removeprefix("ERROR ").strip())
    except (OSError, TimeoutError) as error:
        stream.close()
        raise GuestUnreachableError("the sandbox cannot be reached: it is stopped, or just being started") from error
    except BaseException:
        stream.close()
        raise
    return stream


class GuestLogins:
    """The gateway's own keys, one for each sandbox."""

    def __init__(self) -> None:
        self._keys: dict[str, asyncssh.SSHKey] = {}

    async def log_in(
        self, channel: Path, sandbox_id: str, user: str, agent_path: str | None
    ) -> asyncssh.SSHClientConnection:
        """An SSH connection to the guest as ``user``. ``agent_path``: the socket of the visitor's SSH agent, offered to
        all sessions of this connection. Raises AtelierError."""
        key = self._key(sandbox_id)
        stream = await open_stream(channel, key.export_public_key().decode().strip())
        try:
            return await asyncssh.connect(
                "sandbox",
                sock=stream,
                config=None,
                username=user,
                client_keys=[key],
                # The channel leads to this guest and nowhere else, so its host key proves nothing more.
                known_hosts=None,
                agent_path=None,
                agent_forwarding=agent_path or False,
                password_auth=False,
                kbdint_auth=False,
                compression_algs=None,
                login_timeout=_LOGIN_SECONDS,
            )
        except asyncssh.PermissionDenied as error:
            raise PreconditionError(
                f"the sandbox does not let {user!r} in: is there such a user in it, with a shell?", code="no_guest_user"
            ) from error
        except (asyncssh.Error, OSError) as error:
            raise GuestUnreachableError(f"the sandbox's sshd does not answer as it should: {error}") from error

    def _key(self, sandbox_id: str) -> asyncssh.SSHKey:
        key = self._keys.get(sandbox_id)
        if key is None:
            if len(self._keys) >= _KEYS_MAX:
                self._keys.clear()
            key = self._keys[sandbox_id] = cast(Any, asyncssh).generate_private_key("ssh-ed25519")
        return key


def _refusal(reason: str) -> AtelierError:
    if reason == "refused":
        return PreconditionError(
            "there is no sshd in this sandbox, or it runs since before there was SSH: install openssh-server in it,"
            " or restart it",
            code="no_sshd",
        )
    return GuestUnreachableError(f"the sandbox cannot be reached ({reason or 'no answer'})")
