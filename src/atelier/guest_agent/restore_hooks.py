"""Tells the guest's own programs that the machine was restored: the generation file, and the hooks of its owner.

Called by ``control`` after a restore, before the processes go on. A hook is an executable file in ``HOOKS_FOLDER``; they
run one after another in the order of their names, as root, while everything else still stands still, so a hook must not
wait for another program of the guest. A retry of the identity runs them once more for the same generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from typing import Final

from atelier.guest_protocol.connect import ConnectError

HOOKS_FOLDER: Final = "/etc/atelier/on-restore.d"
GENERATION_PATH: Final = "/run/atelier/generation"
LIMIT_SECONDS: Final = 30.0
"""For all hooks together."""

_KEPT_BYTES: Final = 2048


def write_generation(generation: str) -> None:
    """The file holds another text after each boot and each restore; whoever watches it sees it replaced. Raises
    ConnectError."""
    try:
        os.makedirs(os.path.dirname(GENERATION_PATH), exist_ok=True)
        with open(f"{GENERATION_PATH}.new", "w", encoding="ascii") as file:
            file.write(f"{generation}\n")
        os.replace(f"{GENERATION_PATH}.new", GENERATION_PATH)
    except OSError as error:
        raise ConnectError("internal", f"cannot write {GENERATION_PATH}: {error.strerror}") from None


async def run_hooks(environment: Mapping[str, str], folder: str = HOOKS_FOLDER) -> None:
    """Run all hooks. Raises ConnectError ``aborted`` naming the first that fails or does not end in time; those behind
    it are not run."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + LIMIT_SECONDS
    for path in _hooks(folder):
        try:
            hook = _Hook(path, environment)
        except OSError as error:
            raise _failed(path, f"cannot be run: {error.strerror}", b"") from None
        try:
            async with asyncio.timeout_at(deadline):
                status = await hook.wait()
        except TimeoutError:
            raise _failed(path, f"did not end: all hooks have {LIMIT_SECONDS:g} s", hook.said) from None
        finally:
            hook.close()
        if status:
            raise _failed(path, f"ended with {'signal' if status < 0 else 'exit status'} {abs(status)}", hook.said)


def _hooks(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    paths = [f"{folder}/{name}" for name in names if not name.startswith(".")]
    return [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]


def _failed(path: str, how: str, said: bytes) -> ConnectError:
    words = said.decode(errors="replace").strip()
    return ConnectError("aborted", f"the hook {path} {how}{': ' + words if words else ''}")


class _Hook:
    """One hook that runs, in a session of its own. The end of what it says is kept."""

    def __init__(self, path: str, environment: Mapping[str, str]) -> None:
        self._loop = asyncio.get_running_loop()
        self._status: int | None = None
        self.said = b""
        self._output, theirs = os.pipe()
        os.set_blocking(self._output, False)
        try:
            self._pid = os.posix_spawn(
                path,
                [path],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, theirs, 1),
                    (os.POSIX_SPAWN_DUP2, theirs, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT),
            )
        except BaseException:
            os.close(self._output)
            raise
        finally:
            os.close(theirs)
        self._pidfd = os.pidfd_open(self._pid)
        self._loop.add_reader(self._output, self._hear)

    async def wait(self) -> int:
        """Its exit status, -N after signal N. What it leaves running in the background is not waited for."""
        ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, lambda: ended.done() or ended.set_result(None))
        try:
            await ended
        finally:
            self._loop.remove_reader(self._pidfd)
        self._status = self._reap()
        self._hear()
        return self._status

    def _reap(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def close(self) -> None:
        """Let go of it; one that still runs is killed with its group."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._reap()
        self._loop.remove_reader(self._output)
        os.close(self._output)
        os.close(self._pidfd)

    def _hear(self) -> None:
        try:
            heard = os.read(self._output, 65536)
        except BlockingIOError:
            return
        if not heard:
            self._loop.remove_reader(self._output)
        self.said = (self.said + heard)[-_KEPT_BYTES:]
