"""Has the guest stand still for a snapshot, and go on: processes, the root file system, and the agent's own services.

Called by ``control`` (quiesce, thaw, and the first half of an identity after a restore), by ``shutdown`` and, at the
start, by ``program``. Standing still is written down under /run, which is memory: so it is part of the snapshot, and an
agent that was started anew in the middle knows what to let go. Nothing here goes on by itself after a while: a restored
machine must not, before it has its new identity.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Generator
from fcntl import ioctl
from typing import Final

from atelier.guest_agent.freezer import MARK_PATH, Freezer
from atelier.guest_agent.gate import Gate
from atelier.guest_protocol.connect import ConnectError

LIMIT_SECONDS: Final = 10.0

_ROOT: Final = "/"
_EXPEDITED: Final = "/sys/kernel/rcu_expedited"
# Source: Linux include/uapi/linux/fs.h.
_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878


class Quiesce:
    """One per agent. ``touches_system`` False: only ``gate`` is closed and opened."""

    def __init__(self, gate: Gate, *, touches_system: bool, freezer: Freezer | None = None) -> None:
        self._gate = gate
        self._touches_system = touches_system
        self._freezer = freezer or Freezer()
        self._lock = asyncio.Lock()

    async def begin(self) -> None:
        """Return when nothing but PID 1 and the agent runs and "/" is whole on the disk and takes no writes. Twice is
        once. Raises ConnectError ``aborted`` after ``LIMIT_SECONDS`` or when it cannot be; then all goes on."""
        async with self._lock:
            self._gate.close()
            if not self._touches_system:
                return
            try:
                async with asyncio.timeout(LIMIT_SECONDS):
                    # While all still run: the less is left to write, the shorter they stand still.
                    await _in_thread(os.sync)
                    groups = _Marked(_read_mark())
                    _write_mark(groups)
                    with _short_grace_periods():
                        await self._freezer.freeze(groups)
                        await _in_thread(_freeze_root, thaw_root)
            except BaseException as error:
                self._go_on()
                if isinstance(error, TimeoutError):
                    raise ConnectError("aborted", f"the guest did not stand still within {LIMIT_SECONDS:g} s") from None
                if isinstance(error, OSError):
                    raise ConnectError("aborted", f"the guest cannot stand still: {error}") from None
                raise

    async def end(self) -> None:
        """Let everything go on. Where nothing stands still, nothing changes. Raises ConnectError."""
        async with self._lock:
            try:
                self._go_on()
            except OSError as error:
                raise ConnectError("internal", f"cannot let the guest go on: {error}") from None

    def _go_on(self) -> None:
        if self._touches_system and os.path.exists(MARK_PATH):
            with _short_grace_periods():
                thaw_root()
                self._freezer.unfreeze(_read_mark())
            os.unlink(MARK_PATH)
        self._gate.open()


class _Marked(list[str]):
    """The frozen groups; each is written down before it is frozen."""

    def append(self, group: str) -> None:
        super().append(group)
        _write_mark(self)


def thaw_root() -> None:
    """Let "/" take writes; nothing if it does. Raises OSError."""
    try:
        _root_call(_FITHAW)
    except OSError as error:
        if error.errno != errno.EINVAL:  # it is not frozen
            raise


def _freeze_root() -> None:
    try:
        _root_call(_FIFREEZE)
    except OSError as error:
        if error.errno != errno.EBUSY:  # it is frozen
            raise


def _root_call(request: int) -> None:
    descriptor = os.open(_ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ioctl(descriptor, request, 0)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _short_grace_periods() -> Generator[None]:
    """Have the kernel's readers be waited for actively: else freezing waits 10 ms or more for them, four times over.
    Source: Linux Documentation/admin-guide/kernel-parameters.txt, rcupdate.rcu_expedited."""
    before = b""
    # Where the switch is not there, it takes a little longer.
    with contextlib.suppress(OSError), open(_EXPEDITED, "r+b", buffering=0) as switch:
        before = switch.read()
        switch.write(b"1")
    try:
        yield
    finally:
        with contextlib.suppress(OSError), open(_EXPEDITED, "wb", buffering=0) as switch:
            switch.write(before)


async def _in_thread(work: Callable[[], None], undo: Callable[[], None] | None = None) -> None:
    """Do ``work`` in a thread of its own, so that the agent goes on answering. When this is given up before the end,
    ``undo`` is done at the end. (concurrent.futures would cost an emulated guest more than the work does.)"""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: OSError | None) -> None:
        if not done.done():
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
        elif error is None and undo is not None:
            undo()

    def run() -> None:
        failure = None
        try:
            work()
        except OSError as error:
            failure = error
        loop.call_soon_threadsafe(finish, failure)

    _thread.start_new_thread(run, ())
    await done


def _read_mark() -> list[str]:
    try:
        with open(MARK_PATH, encoding="utf-8", errors="surrogateescape") as lines:
            return lines.read().split("\n")[:-1]
    except FileNotFoundError:
        return []


def _write_mark(groups: list[str]) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.dirname(MARK_PATH))
    with open(MARK_PATH, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{group}\n" for group in groups)
