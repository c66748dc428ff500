"""What ``atelier doctor`` says of the SSH port."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from atelier.host.checks.local import CheckStatus
from atelier.host.checks.ssh import check_ssh


@contextmanager
def greeting(banner: bytes) -> Iterator[tuple[str, int]]:
    """A server that says this to its one visitor and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            visitor, _ = server.accept()
            with visitor:
                visitor.sendall(banner)

        thread = threading.Thread(target=serve)
        thread.start()
        yield ("127.0.0.1", server.getsockname()[1])
        thread.join(30)


@pytest.mark.parametrize(
    ("banner", "status", "words"),
    [
        (b"SSH-2.0-AsyncSSH_2.24.0\r\n", CheckStatus.OK, "answers"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", CheckStatus.WARNING, "another SSH server (SSH-2.0-OpenSSH_9.2p1)"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", CheckStatus.WARNING, "speaks no SSH"),
        (b"", CheckStatus.WARNING, "speaks no SSH"),
        (b"\xff" * 400, CheckStatus.WARNING, "speaks no SSH"),
    ],
)
def test_who_answers(banner: bytes, status: CheckStatus, words: str) -> None:
    with greeting(banner) as listen:
        found = check_ssh(listen, is_reached_from_elsewhere=False)
    assert found.status is status
    assert words in found.message
    assert ("ATELIER_SSH_LISTEN" in found.remedy) is (status is CheckStatus.WARNING)


def test_nobody_answers_and_it_is_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = ("127.0.0.1", server.getsockname()[1])
    found = check_ssh(listen, is_reached_from_elsewhere=False)
    assert found.status is CheckStatus.WARNING
    assert "ATELIER_SSH_LISTEN" in found.remedy
    off = check_ssh(None, is_reached_from_elsewhere=True)
    assert (off.status, off.remedy) == (CheckStatus.OK, "")


def test_a_manager_that_others_reach_with_an_ssh_that_they_do_not() -> None:
    found = check_ssh(("127.0.0.1", 2222), is_reached_from_elsewhere=True)
    assert found.status is CheckStatus.WARNING
    assert "ATELIER_SSH_LISTEN=0.0.0.0:2222" in found.remedy
