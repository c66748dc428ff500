"""Whether SSH is served where it should be, for ``atelier doctor``."""

from __future__ import annotations

import socket

from atelier.host.checks.local import CheckResult, CheckStatus

_SECONDS = 5.0
_OURS = "AsyncSSH"
_LONGEST_BANNER = 255
_LOOPBACK = ("127.", "::1", "localhost")


def check_ssh(listen: tuple[str, int] | None, *, is_reached_from_elsewhere: bool) -> CheckResult:
    """``listen``: host and port of ``ATELIER_SSH_LISTEN``; None: it is off."""
    if listen is None:
        return _found(CheckStatus.OK, "turned off: ATELIER_SSH_LISTEN is off")
    host, port = listen
    place = f"{host}:{port}"
    if is_reached_from_elsewhere and host.startswith(_LOOPBACK):
        remedy = f"set ATELIER_SSH_LISTEN=0.0.0.0:{port}, so that it is reached from other machines as the manager is"
        return _found(CheckStatus.WARNING, f"{place} is reached from this machine alone", remedy)
    try:
        banner = _read_banner({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
    except OSError as error:
        remedy = (
            "nothing to do if the manager does not run: atelier up; else its log says why it does not serve SSH, and"
            " ATELIER_SSH_LISTEN=ADDRESS:PORT chooses another place"
        )
        return _found(CheckStatus.WARNING, f"{place} does not answer: {error}", remedy)
    if not banner.startswith("SSH-2.0-"):
        said = "somebody who speaks no SSH"
    elif _OURS not in banner:
        said = f"another SSH server ({banner})"
    else:
        return _found(CheckStatus.OK, f"{place} answers")
    return _found(CheckStatus.WARNING, f"at {place} is {said}", "set ATELIER_SSH_LISTEN to another address or port")


def _read_banner(host: str, port: int) -> str:
    """The server's first line. Raises OSError."""
    line = b""
    with socket.create_connection((host, port), _SECONDS) as connection:
        while not line.endswith(b"\n") and len(line) < _LONGEST_BANNER:
            try:
                piece = connection.recv(1)
            except TimeoutError:
                break
            if not piece:
                break
            line += piece
    return line.decode("ascii", "replace").strip()


def _found(status: CheckStatus, message: str, remedy: str = "") -> CheckResult:
    return CheckResult("SSH", status, message, remedy)
