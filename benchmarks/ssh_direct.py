"""``python -m benchmarks.ssh_direct CHANNEL KEY``: a ProxyCommand (with ProxyUseFdpass) that joins the ssh program with a guest's
sshd over the channel alone: no gateway's SSH is between them. ``KEY``: the public key's line that this sshd is to trust."""

from __future__ import annotations

import socket
import sys

from atelier.guest_protocol import GUEST_SSH_PORT


def main() -> None:
    channel, key = sys.argv[1:]
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(channel)
    stream.sendall(f"CONNECT {GUEST_SSH_PORT}\n{key}\n".encode())
    answer = b""
    while not answer.endswith(b"\n"):
        piece = stream.recv(1)
        if not piece:
            break
        answer += piece
    if not answer.startswith(b"OK "):
        raise SystemExit(f"the guest cannot be reached: {answer!r}")
    with socket.socket(fileno=1) as client:
        socket.send_fds(client, [b"\0"], [stream.fileno()])


if __name__ == "__main__":
    main()
