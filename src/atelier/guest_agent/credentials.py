"""Lets this thread touch the file system with a user's rights instead of root's, for a few system calls at a time.

Called around every file operation that the agent does in somebody's name. The kernel itself then decides what is
allowed, so links, mounts and races are no way around. Effective ids and groups are set by raw system calls, which
change this thread only; libc's own functions would change every thread of the process. Nothing may be awaited, and no
process started, inside ``acting_as``.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Final, Protocol

# Numbers of setgroups, setresuid and setresgid. Source: Linux arch/x86/entry/syscalls/syscall_64.tbl and
# include/uapi/asm-generic/unistd.h.
_SYSCALL_NUMBERS: Final = {"x86_64": (116, 117, 119), "aarch64": (159, 147, 149)}
_UNCHANGED: Final = -1
_KEPT_ARRAYS_MAX: Final = 64


class Account(Protocol):
    """What is needed of a user: the numbers that the kernel checks."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def groups(self) -> Sequence[int]:
        """Supplementary groups."""
        ...


class _Kernel:
    """The three system calls, bound once."""

    def __init__(self) -> None:
        machine = os.uname().machine
        if machine not in _SYSCALL_NUMBERS:
            raise OSError(f"no system call numbers are known for {machine}")
        self._setgroups, self._setresuid, self._setresgid = (
            ctypes.c_long(number) for number in _SYSCALL_NUMBERS[machine]
        )
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._arrays: dict[tuple[int, ...], ctypes.Array[ctypes.c_uint32]] = {}
        self.own_gid = os.getgid()
        self.own_groups = tuple(os.getgroups())

    def _call(self, *arguments: object) -> None:
        if self._syscall(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def set_groups(self, groups: Sequence[int]) -> None:
        key = tuple(groups)
        array = self._arrays.get(key)
        if array is None:
            if len(self._arrays) > _KEPT_ARRAYS_MAX:
                self._arrays.clear()
            array = self._arrays[key] = (ctypes.c_uint32 * len(key))(*key)
        self._call(self._setgroups, ctypes.c_size_t(len(key)), array)

    def set_effective_uid(self, uid: int) -> None:
        self._call(self._setresuid, ctypes.c_int(_UNCHANGED), ctypes.c_uint32(uid), ctypes.c_int(_UNCHANGED))

    def set_effective_gid(self, gid: int) -> None:
        self._call(self._setresgid, ctypes.c_int(_UNCHANGED), ctypes.c_uint32(gid), ctypes.c_int(_UNCHANGED))


_kernel: _Kernel | None = None


class acting_as:
    """``with acting_as(user): os.open(...)``: effective uid, gid and groups are the user's inside.

    The real and saved uid stay root's, so the user can neither signal nor trace the agent meanwhile. With an effective
    uid that is not 0 the kernel clears all effective capabilities, and gives them back at the end.

    Raises PermissionError when the agent is not root and the user is another than the agent's own.
    """

    __slots__ = ("_switches", "_user")

    def __init__(self, user: Account) -> None:
        self._user = user
        self._switches = False

    def __enter__(self) -> None:
        global _kernel
        user = self._user
        own_uid = os.geteuid()
        if user.uid == own_uid:
            return
        if own_uid != 0:
            raise PermissionError(1, "the guest agent is not root and cannot act for another user")
        if _kernel is None:
            _kernel = _Kernel()
        self._switches = True
        try:
            _kernel.set_groups(user.groups)
            _kernel.set_effective_gid(user.gid)
            _kernel.set_effective_uid(user.uid)
        except BaseException:
            self._return_to_root()
            raise

    def __exit__(self, *_: object) -> None:
        if self._switches:
            self._return_to_root()

    def _return_to_root(self) -> None:
        assert _kernel is not None
        self._switches = False
        try:
            _kernel.set_effective_uid(0)
            _kernel.set_effective_gid(_kernel.own_gid)
            _kernel.set_groups(_kernel.own_groups)
        except OSError as error:
            # Going on with the wrong rights is worse than a restart by PID 1.
            print(f"cannot become root again: {error}", file=sys.stderr, flush=True)
            os.abort()
