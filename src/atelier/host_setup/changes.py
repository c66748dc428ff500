"""A change of the machine: what of it is missing, how it is made, how it is undone; and those that are files and folders.

A change says nothing of others, and may be made twice. What somebody else has put in its place is *foreign*: told before
anything is changed, and never touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, Protocol

from atelier.host_setup.host import Host
from atelier.host_setup.journal import Record

Note = Callable[[Record], None]
"""Writes down what is about to be made."""


class LookState(StrEnum):
    THERE = "there"
    MISSING = "missing"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Look:
    """``words``: what would be made, or what is in the way; ``remedy``: of the latter."""

    state: LookState
    words: str = ""
    remedy: str = ""


THERE = Look(LookState.THERE)


def missing(words: str) -> Look:
    return Look(LookState.MISSING, words)


def foreign(words: str, remedy: str) -> Look:
    return Look(LookState.FOREIGN, words, remedy)


class Change(Protocol):
    kind: ClassVar[str]

    @property
    def key(self) -> str:
        """Which of its kind: with ``kind`` it names the change for ever."""
        ...

    async def look(self, host: Host, own: Record | None) -> Look:
        """``own``: what was written down when Atelier made it; None: it did not. Changes nothing."""
        ...

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        """Called where ``look`` says missing. ``note`` comes before what it notes."""
        ...


class Check(ABC):
    """A change that makes nothing: what it looks for is as it should be, or in the way."""

    __slots__ = ()

    @abstractmethod
    async def look(self, host: Host, own: Record | None) -> Look:
        """As a change's; never missing."""

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        raise AssertionError(f"{type(self).__name__} said that something is missing")


@dataclass(frozen=True, slots=True)
class UndoOptions:
    """``data``: disks, database, images go too; ``packages``: what was installed goes too."""

    data: bool = False
    packages: bool = False


Undo = Callable[[Host, Record, UndoOptions], Awaitable[str]]
"""Ensures absence of what the record says; returns why something was kept, empty if nothing was. What is kept stays in
the journal where a later uninstall could remove it, which ``KEPT`` says at the beginning."""

KEPT = "kept: "


@dataclass(frozen=True, slots=True)
class FileChange:
    """``after``: the command that makes the system see it, run when it was written and when it was removed."""

    path: str
    content: bytes
    mode: int = 0o644
    owner: str = "root"
    group: str = "root"
    after: tuple[str, ...] = ()

    kind: ClassVar[str] = "file"

    @property
    def key(self) -> str:
        return self.path

    async def look(self, host: Host, own: Record | None) -> Look:
        path = host.path(self.path)
        if blocking := _no_folder(host, Path(self.path)):
            return blocking
        try:
            found = path.lstat()
        except FileNotFoundError:
            return missing(f"write {self.path}")
        if not stat.S_ISREG(found.st_mode):
            return foreign(f"{self.path} is no file", f"look what it is, and move it away: mv {self.path}{{,.before}}")
        now = digest(path)
        is_right = now == _sha256(self.content) and stat.S_IMODE(found.st_mode) == self.mode
        if own is None:
            if is_right and host.is_owned(found, self.owner, self.group):
                return THERE
            return foreign(
                f"{self.path} is there, and not of Atelier's making",
                f"look what it is for, and move it away: mv {self.path} {self.path}.before",
            )
        if is_right and host.is_owned(found, self.owner, self.group):
            return THERE
        if now not in own["sha256"]:
            return foreign(
                f"{self.path} was changed since Atelier wrote it",
                f"keep what you want of it elsewhere, then: mv {self.path} {self.path}.before",
            )
        return missing(f"update {self.path}")

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        before: list[str] = own["sha256"][-1:] if own else []
        note({"path": self.path, "sha256": [*before, _sha256(self.content)], "after": list(self.after)})
        write_file(host, self.path, self.content, self.mode, self.owner, self.group)
        if self.after:
            await host.run(*self.after)


async def undo_file(host: Host, record: Record, options: UndoOptions) -> str:
    path = host.path(record["path"])
    if not path.is_symlink() and path.is_file() and digest(path) not in record["sha256"]:
        return f"{record['path']} was changed since Atelier wrote it, and is left"
    path.unlink(missing_ok=True)
    if record["after"]:
        await host.ask(*record["after"])
    return ""


@dataclass(frozen=True, slots=True)
class FolderChange:
    """``is_data``: what is in it is people's, and goes with the data only. ``is_shared``: one that others may have made
    and use; nothing is said of it then but that it is there."""

    path: str
    mode: int = 0o755
    owner: str = "root"
    group: str = "root"
    is_data: bool = False
    is_shared: bool = False

    kind: ClassVar[str] = "folder"

    @property
    def key(self) -> str:
        return self.path

    async def look(self, host: Host, own: Record | None) -> Look:
        try:
            found = host.path(self.path).lstat()
        except FileNotFoundError:
            return missing(f"make the folder {self.path}")
        if not stat.S_ISDIR(found.st_mode):
            return foreign(
                f"{self.path} is no folder", f"look what it is, and move it away: mv {self.path}{{,.before}}"
            )
        is_right = stat.S_IMODE(found.st_mode) == self.mode and host.is_owned(found, self.owner, self.group)
        if is_right or self.is_shared:
            return THERE
        if own is None:
            return foreign(
                f"the folder {self.path} is there, and not of Atelier's making",
                f"look what is in it, then: mv {self.path} {self.path}.before; or name another in the configuration",
            )
        return missing(f"set the rights of {self.path}")

    async def apply(self, host: Host, own: Record | None, note: Note) -> None:
        path = host.path(self.path)
        note({"path": self.path, "is_data": self.is_data})
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not path.exists():
            path.mkdir(mode=0o700)
        host.set_owner(path, self.owner, self.group)
        path.chmod(self.mode)


async def undo_folder(host: Host, record: Record, options: UndoOptions) -> str:
    path = host.path(record["path"])
    if path.is_symlink() or not path.is_dir():
        return ""
    if record["is_data"]:
        if not options.data:
            return f"{KEPT}{record['path']}"
        shutil.rmtree(path)
    elif any(path.iterdir()):
        return f"the folder {record['path']} is not empty, and is left"
    else:
        path.rmdir()
    return ""


def write_file(host: Host, absolute: str, content: bytes, mode: int, owner: str, group: str) -> None:
    """Whole or not at all, and never readable for more people than in the end."""
    path = host.path(absolute)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        host.set_owner(Path(temporary), owner, group)
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _no_folder(host: Host, path: Path) -> Look | None:
    """Where something that is no folder stands on the way to ``path``."""
    for parent in path.parents:
        there = host.path(parent)
        if there.exists() and not there.is_dir():
            return foreign(f"{parent} is no folder", f"look what it is, and move it away: mv {parent}{{,.before}}")
    return None
