"""A TAP that leads nowhere: in a network namespace of its own, which goes with the descriptor.

Called by the VMM drivers, for a machine that never runs and yet must have the card of one that did: what a card can do
depends on what is behind it. Works for root, and for an ordinary user where the kernel gives user namespaces. Run as a
program, this module makes the TAP in the namespace that it was started in. Source: unshare(1), linux/if_tun.h.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from atelier.host.command import show
from atelier.host.tap import open_existing
from atelier.model.errors import CommandError, MissingProgramError

_NAME = "unconnected"
_TIMEOUT_SECONDS = 30.0


@asynccontextmanager
async def unconnected_tap() -> AsyncGenerator[int]:
    """Its descriptor, as ``tap.open_existing`` gives it, for as long as the block runs.

    Raises CommandError, MissingProgramError.
    """
    descriptor = await asyncio.to_thread(_open)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open() -> int:
    # In a process of its own: no single thread of this one could enter a user namespace.
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    ours, its = socket.socketpair()
    with ours, its:
        program = [sys.executable, "-P", "-m", __name__, str(its.fileno())]
        arguments = ["unshare", *user, "--net", *program]
        try:
            subprocess.run(
                arguments,
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT_SECONDS,
                check=True,
            )
        except FileNotFoundError as error:
            raise MissingProgramError("unshare is not installed", hint="apt-get install util-linux") from error
        except subprocess.TimeoutExpired as error:
            raise CommandError(f"{show(arguments)} did not end within {_TIMEOUT_SECONDS:g} s") from error
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()[-1000:]
            raise CommandError(f"{show(arguments)}: exit status {error.returncode}: {said}") from error
        its.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise CommandError(f"{show(arguments)} handed over no TAP")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def _hand_over(socket_descriptor: int) -> None:
    with socket.socket(fileno=socket_descriptor) as answer:
        # It is made by being opened, and goes when nobody holds it open.
        socket.send_fds(answer, [b"x"], [open_existing(_NAME)])


if __name__ == "__main__":
    _hand_over(int(sys.argv[1]))
