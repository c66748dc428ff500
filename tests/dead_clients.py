"""Clients of a long-lived process that are dead before it comes to what they have asked."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path


def ask_and_die(pid: int, control_socket: Path, **request: object) -> None:
    """The request lies at the control socket of process ``pid``, and whoever sent it is gone, when the process looks."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "it does not stop"
        time.sleep(0.001)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(control_socket))
            client.sendall(json.dumps(request).encode() + b"\n")
    finally:
        os.kill(pid, signal.SIGCONT)
