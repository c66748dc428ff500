"""A program of ours in a lab's host: ``program_in_lab HOST_PID UID MODULE ARGUMENTS...``, as ``nsenter`` and ``setpriv`` would
start ``python -m MODULE``, for who was forked (``forked_programs``) and has no interpreter to start.

``NetworkLab`` says the words for it. UID 0 stays root; any other gives up root for good.
"""

from __future__ import annotations

import ctypes
import os
import sys

from tests.forked_programs import run_module

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
"""Source: linux/prctl.h."""


def enter(process: int) -> None:
    """The process's namespaces of network and mounts."""
    # Both are opened first: /proc is looked up in the present one.
    for namespace in [os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "mnt")]:
        _succeeded(_libc.setns(namespace, 0))
        os.close(namespace)


def become(user: int) -> None:
    _succeeded(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # An executed program's /proc entries are its user's; those of who has only changed its user are root's.
    _succeeded(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0))
    os.environ["HOME"] = "/nonexistent"


def _succeeded(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    _, host, user, module, *arguments = sys.argv
    enter(int(host))
    if int(user):
        become(int(user))
    run_module(module, *arguments)
