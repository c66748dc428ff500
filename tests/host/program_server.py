"""Runs inside an emulated host: programs of Atelier's, forked from a server that has imported them, since an interpreter
takes a quarter of a minute there to begin.

    program_server.py serve                                    as root; begun by the first call
    program_server.py call USER VARIABLES MODULE WORD...       as from ``python -P -m MODULE WORD...``, as USER, in /

``VARIABLES`` is a JSON object. What is forked has its own process, user, environment, streams and exit status. The
calling side takes nothing from outside the standard library.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

SOCKET = "/run/test-programs"
_CHECKOUT = Path(__file__).resolve().parents[2]
_PYTHON = "/opt/atelier/venv/bin/python"
_START_SECONDS = 300


def serve() -> None:
    import importlib

    sys.path.insert(0, str(_CHECKOUT))
    from atelier.cli.__main__ import COMMANDS

    for module in ("atelier.host_setup.__main__", "asyncio", "json", "tests.forked_programs"):
        importlib.import_module(module)
    for command in COMMANDS.values():
        importlib.import_module(command.location.partition(":")[0])
    for module in ("sandbox", "snapshots", "processes", "steps"):
        importlib.import_module(f"atelier.client.{module}")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{SOCKET}.new")
    listener.listen()
    Path(f"{SOCKET}.new").rename(SOCKET)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _answer(connection)
            return
        connection.close()


def _answer(connection: socket.socket) -> None:
    """In a process of its own. Returns in the one that has become the program and ended without an exit status."""
    request, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    program = os.fork()
    if program == 0:
        connection.close()
        _become_program(json.loads(request), streams)
        return
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(program, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become_program(request: dict[str, object], streams: list[int]) -> None:
    import pwd

    from tests.forked_programs import run_module

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.setsid()
    os.chdir("/")
    user = pwd.getpwnam(str(request["user"]))
    os.environ.clear()
    os.environ.update(
        {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": user.pw_dir,
            "USER": user.pw_name,
            "LC_ALL": "C.UTF-8",
            **request["variables"],  # type: ignore[dict-item]
        }
    )
    if user.pw_uid:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    run_module(*(str(word) for word in request["words"]))  # type: ignore[union-attr]


def call(user: str, variables: str, *words: str) -> NoReturn:
    request = json.dumps({"user": user, "variables": json.loads(variables), "words": words}).encode()
    with _connected() as connection:
        socket.send_fds(connection, [request], [0, 1, 2])
        status = connection.recv(16)
    sys.exit(int(status) if status else "the program server is gone")


def _connected() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(SOCKET)
    except OSError:
        _start()
        connection.connect(SOCKET)
    return connection


def _start() -> None:
    import subprocess
    import time

    starting = ["systemd-run", "--quiet", "--collect", "--unit=test-programs", _PYTHON, "-P", __file__, "serve"]
    Path(SOCKET).unlink(missing_ok=True)
    subprocess.run(starting, check=True)
    limit = time.monotonic() + _START_SECONDS
    while not Path(SOCKET).exists():
        if time.monotonic() > limit:
            sys.exit("the program server does not start: journalctl -u test-programs")
        time.sleep(0.2)


def main(words: Sequence[str]) -> None:
    if words[0] == "serve":
        serve()
    else:
        call(*words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
