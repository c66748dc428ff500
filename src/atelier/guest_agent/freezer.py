"""Stops all processes of the guest but PID 1 and the guest agent, and lets them go on, by the kernel's freezer (cgroup v2).

Used by ``quiesce``. PID 1 and the agent live in the group ``GROUP`` (atelier-init puts them there), so that every process
that descends from them is in it without anything being done for it when it starts. To stop them all, the two step out into
the root group and ``GROUP`` is frozen with one write. What is not in it (root may make groups of its own, and systemd does)
is found and frozen with it. Source: Linux Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Final

GROUP: Final = "/atelier"
MARK_PATH: Final = "/run/atelier/quiesced"
"""It is there while the guest stands still: the groups that are frozen, a line each."""
SYSTEMD_MARK: Final = "/run/systemd/system"

_FIRST_PAUSE_SECONDS: Final = 0.001
_PAUSE_MAX_SECONDS: Final = 0.02


class Freezer:
    """``hierarchy`` is where cgroup v2 is mounted. Groups are named by their path in it, the root group by ``""``."""

    def __init__(self, hierarchy: str = "/sys/fs/cgroup") -> None:
        self._hierarchy = hierarchy

    async def freeze(self, groups: list[str]) -> None:
        """Return when all stand still. ``groups`` are those that were frozen before; each further one is added before
        it is frozen, so that it holds all even when this fails or is cancelled. Raises OSError."""
        self._make_group()
        for pid in (os.getpid(), 1):
            if (_group_of(pid) + "/").startswith(GROUP + "/"):
                self._move(pid, "")
        spared = _with_parents(_group_of(os.getpid()), _group_of(1))
        for group in groups:
            self._set_frozen(group, True)
        pause_seconds = _FIRST_PAUSE_SECONDS
        while True:
            self._freeze_all_but(spared, groups)
            if not self._gather_strays(spared) and all(self._is_frozen(group) for group in groups):
                return
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * 2, _PAUSE_MAX_SECONDS)

    def unfreeze(self, groups: list[str]) -> None:
        """Let all that is in ``groups`` go on, and put PID 1 and the agent back, so that what they start from now on is
        in ``GROUP`` again. Where systemd is PID 1 it keeps its own order. Raises OSError."""
        for group in groups:
            self._set_frozen(group, False)
        if os.path.isdir(SYSTEMD_MARK):
            return
        # Without: what they start is looked for the next time.
        with contextlib.suppress(OSError):
            self._make_group()
            for pid in (1, os.getpid()):
                if _group_of(pid) != GROUP:
                    self._move(pid, GROUP)

    def _make_group(self) -> None:
        if not os.path.exists(f"{self._hierarchy}/cgroup.procs"):
            raise FileNotFoundError(2, "cgroup v2 is not mounted", self._hierarchy)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._hierarchy + GROUP)

    def _freeze_all_but(self, spared: set[str], groups: list[str]) -> None:
        for parent in spared:
            for group in self._children(parent):
                if group in spared or group in groups:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if self._read(group, "cgroup.freeze").strip() == "1":
                        continue  # somebody of the guest's own has frozen it: it stays as it is afterwards
                    groups.append(group)
                    self._set_frozen(group, True)

    def _gather_strays(self, spared: set[str]) -> bool:
        """Move into ``GROUP`` who is in a group that cannot be frozen. Whether there was anybody."""
        own = (1, os.getpid())
        found = False
        for group in spared:
            for line in self._read(group, "cgroup.procs").split():
                pid = int(line)
                if pid in own or not _has_program(pid):
                    continue
                with contextlib.suppress(ProcessLookupError):
                    self._move(pid, GROUP)
                    found = True
        return found

    def _set_frozen(self, group: str, is_frozen: bool) -> None:
        with contextlib.suppress(FileNotFoundError):  # an empty group may be removed at any time
            self._write(group, "cgroup.freeze", "1" if is_frozen else "0")

    def _is_frozen(self, group: str) -> bool:
        try:
            return "frozen 1" in self._read(group, "cgroup.events")
        except FileNotFoundError:
            return True

    def _children(self, group: str) -> Iterator[str]:
        with os.scandir(self._hierarchy + group) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield f"{group}/{entry.name}"

    def _move(self, pid: int, group: str) -> None:
        self._write(group, "cgroup.procs", str(pid))

    def _read(self, group: str, name: str) -> str:
        with open(f"{self._hierarchy}{group}/{name}", encoding="ascii") as file:
            return file.read()

    def _write(self, group: str, name: str, value: str) -> None:
        descriptor = os.open(f"{self._hierarchy}{group}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)


def _group_of(pid: int) -> str:
    """The process's group in the v2 hierarchy. Raises OSError."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.startswith("0::"):
                return line[3:].rstrip("\n").rstrip("/")
    raise FileNotFoundError(2, "the kernel has no cgroup v2")


def _with_parents(*groups: str) -> set[str]:
    found = {""}
    for group in groups:
        while group:
            found.add(group)
            group = group.rpartition("/")[0]
    return found


def _has_program(pid: int) -> bool:
    """False for kernel threads and the ended."""
    try:
        os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return False
    return True
