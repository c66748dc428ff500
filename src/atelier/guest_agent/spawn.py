"""Starts programs for a user: in a session of their own, with pipes or a terminal, by posix_spawn.

Used by ``process`` alone. Under software emulation a fork of the agent costs more than the program that it starts, so
neither fork nor a thread is used: this thread takes on the user's identity by raw system calls (libc's own would
change every thread), changes to the working directory, spawns, and becomes root again. Nothing may be awaited in
between. The kernel thereby checks folder and program with the user's rights.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from atelier.guest_agent.users import User
from atelier.guest_protocol.connect import ConnectError

DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# setgroups, setresuid and setresgid. Source: Linux arch/x86/entry/syscalls/syscall_64.tbl and
# include/uapi/asm-generic/unistd.h.
_SYSCALL_NUMBERS: Final = {"x86_64": (116, 117, 119), "aarch64": (159, 147, 149)}
_EXHAUSTED: Final = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC)
_RESET_SIGNALS: Final = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)
_TTY_GROUP: Final = 5


class Spawned:
    """A program that runs. The descriptors are the agent's ends, non-blocking; -1: there is none."""

    __slots__ = ("pid", "stderr", "stdin", "stdout", "terminal")

    def __init__(self) -> None:
        self.pid = 0
        self.stdin = -1
        self.stdout = -1
        self.stderr = -1
        self.terminal = -1


def spawn(
    arguments: list[str],
    environment: Mapping[str, str],
    directory: bytes | None,
    user: User,
    *,
    with_stdin: bool,
    terminal_size: tuple[int, int] | None = None,
) -> Spawned:
    """Start ``arguments`` (the program is looked up in ``environment``'s PATH) with ``directory`` as its working one
    (None: the user's home, or / if it has none).

    ``terminal_size`` (columns, rows): on a new terminal instead of pipes. Without ``with_stdin`` the program reads
    /dev/null. Raises ConnectError ``invalid_argument`` (no such program or folder), ``permission_denied``,
    ``resource_exhausted``.
    """
    spawned = Spawned()
    theirs: list[int] = []
    try:
        if terminal_size is None:
            actions = _make_pipes(spawned, theirs, with_stdin)
        else:
            actions = _make_terminal(spawned, theirs, user, terminal_size)
        with _Identity(user):
            _change_directory(directory, user)
            try:
                program = _find_program(arguments[0], environment)
                spawned.pid = os.posix_spawn(
                    program,
                    arguments,
                    environment,
                    file_actions=actions,
                    setsid=True,
                    setsigmask=(),
                    setsigdef=_RESET_SIGNALS,
                )
            finally:
                os.chdir("/")
    except BaseException as error:
        for descriptor in (spawned.stdin, spawned.stdout, spawned.stderr, spawned.terminal):
            if descriptor >= 0:
                os.close(descriptor)
        if isinstance(error, OSError):
            raise _start_error(arguments[0], error) from None
        if isinstance(error, ValueError):  # a NUL byte, or "=" in a variable's name
            raise ConnectError("invalid_argument", f"cannot start {arguments[0][:200]!r}: {error}") from None
        raise
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    return spawned


def set_terminal_size(terminal: int, columns: int, rows: int) -> None:
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _make_pipes(spawned: Spawned, theirs: list[int], with_stdin: bool) -> list[tuple[Any, ...]]:
    actions: list[tuple[Any, ...]] = []
    if with_stdin:
        child_end, spawned.stdin = os.pipe()
        theirs.append(child_end)
        os.set_blocking(spawned.stdin, False)
        actions.append((os.POSIX_SPAWN_DUP2, child_end, 0))
    else:
        actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))
    spawned.stdout, child_end = os.pipe()
    theirs.append(child_end)
    actions.append((os.POSIX_SPAWN_DUP2, child_end, 1))
    spawned.stderr, child_end = os.pipe()
    theirs.append(child_end)
    actions.append((os.POSIX_SPAWN_DUP2, child_end, 2))
    os.set_blocking(spawned.stdout, False)
    os.set_blocking(spawned.stderr, False)
    return actions


def _make_terminal(spawned: Spawned, theirs: list[int], user: User, size: tuple[int, int]) -> list[tuple[Any, ...]]:
    spawned.terminal, child_end = os.openpty()
    theirs.append(child_end)
    if os.geteuid() == 0:
        os.fchown(child_end, user.uid, _TTY_GROUP)
        os.fchmod(child_end, 0o620)
    set_terminal_size(spawned.terminal, *size)
    os.set_blocking(spawned.terminal, False)
    # A session leader without a terminal gets the first one that it opens: setsid comes before these actions.
    return [
        (os.POSIX_SPAWN_OPEN, 0, os.ttyname(child_end), os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]


def _change_directory(directory: bytes | None, user: User) -> None:
    if directory is None:
        # As login does. Many a system user has no home.
        with suppress(OSError):
            os.chdir(user.home)
        return
    try:
        os.chdir(directory)
    except OSError as error:
        shown = directory.decode("utf-8", "replace")
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConnectError("permission_denied", f"the working directory {shown!r} is closed to the user") from None
        raise ConnectError(
            "invalid_argument", f"the working directory {shown!r} cannot be used: {error.strerror}"
        ) from None


def _find_program(name: str, environment: Mapping[str, str]) -> str:
    if "/" in name:
        return name
    if name:
        for folder in environment.get("PATH", DEFAULT_PATH).split(":"):
            candidate = f"{folder or '.'}/{name}"
            # By the effective ids, which are the user's now.
            if os.access(candidate, os.X_OK, effective_ids=True) and not os.path.isdir(candidate):
                return candidate
    raise FileNotFoundError(errno.ENOENT, "not found in PATH")


def _start_error(program: str, error: OSError) -> ConnectError:
    shown = program[:200]
    if error.errno in _EXHAUSTED:
        return ConnectError("resource_exhausted", f"cannot start {shown!r}: {error.strerror}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConnectError("permission_denied", f"cannot start {shown!r}: {error.strerror}")
    if error.errno == errno.ENOENT:
        return ConnectError("not_found", f"cannot start {shown!r}: {error.strerror}")
    return ConnectError("invalid_argument", f"cannot start {shown!r}: {error.strerror}")


class _Identity:
    """``with``: this thread is ``user``; its saved ids stay the agent's, so that it finds the way back.

    A program that is started meanwhile keeps nothing of the saved ids: execve overwrites them with the effective ones.
    """

    __slots__ = ("_switches", "_user")

    def __init__(self, user: User) -> None:
        self._user = user
        self._switches = False

    def __enter__(self) -> None:
        user = self._user
        own = os.geteuid()
        if own != 0:
            if user.uid != own:
                raise ConnectError("permission_denied", "the guest agent is not root and cannot act for another user")
            return
        self._switches = True
        try:
            _system_call(0, len(user.groups), _group_array(user.groups))
            _system_call(2, user.gid, user.gid, 0)
            _system_call(1, user.uid, user.uid, 0)
        except BaseException:
            self._return()
            raise

    def __exit__(self, *_: object) -> None:
        if self._switches:
            self._return()

    def _return(self) -> None:
        try:
            _system_call(1, 0, 0, 0)
            _system_call(2, 0, 0, 0)
            _system_call(0, len(_OWN_GROUPS), _group_array(_OWN_GROUPS))
        except OSError:
            # Going on with the wrong rights is worse than a restart by PID 1.
            os.abort()


_OWN_GROUPS: Final = tuple(os.getgroups())
_kernel: Callable[..., int] | None = None
_numbers: tuple[int, int, int] = (0, 0, 0)
_arrays: dict[tuple[int, ...], Any] = {}


def _system_call(which: int, *arguments: Any) -> None:
    global _kernel, _numbers
    import ctypes

    if _kernel is None:
        machine = os.uname().machine
        if machine not in _SYSCALL_NUMBERS:
            raise OSError(errno.ENOSYS, f"no system call numbers are known for {machine}")
        _numbers = _SYSCALL_NUMBERS[machine]
        _kernel = ctypes.CDLL(None, use_errno=True).syscall
    if _kernel(_numbers[which], *arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _group_array(groups: tuple[int, ...]) -> Any:
    array = _arrays.get(groups)
    if array is None:
        import ctypes

        array = _arrays[groups] = (ctypes.c_uint32 * len(groups))(*groups)
    return array
