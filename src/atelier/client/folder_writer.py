"""Unpacks the tar stream of a sandbox's folder into a folder of this machine, whatever the sandbox put into it.

Called by ``files.py`` for folder downloads. Everything is placed relative to descriptors of folders that were opened
one name at a time without following links, so nothing can be written outside of the target. Refused at once: absolute
names, ``..``, ways through links, more entries or bytes than ``UnpackLimits``. Left out and reported: links that lead
outside, devices, fifos. Never kept: setuid, setgid and sticky bits, owners.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from atelier.client.local_errors import local_error, shown_name
from atelier.client.tar_reader import MemberKind, TarMember, TarReader
from atelier.model.errors import ConflictError, GuestProtocolError

_MIB = 1024 * 1024
_NAME_MAX_BYTES = 255
_PATH_MAX_BYTES = 4096
_REPORTED_AT_MOST = 100
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class UnpackLimits:
    """How much of a sandbox's folder is taken at most. Entries that are left out count too."""

    max_entries: int = 1_000_000
    max_total_bytes: int = 32 * 1024 * _MIB


@dataclass(slots=True)
class UnpackReport:
    """What came of it. ``skipped`` holds the first 100 (name, reason); ``skipped_count`` counts them all."""

    file_count: int = 0
    folder_count: int = 0
    link_count: int = 0
    content_bytes: int = 0
    skipped: list[tuple[bytes, str]] = field(default_factory=list[tuple[bytes, str]])
    skipped_count: int = 0

    def skip(self, name: bytes, reason: str) -> None:
        self.skipped_count += 1
        if len(self.skipped) < _REPORTED_AT_MOST:
            self.skipped.append((name, reason))


def refused(name: bytes, reason: str) -> GuestProtocolError:
    return GuestProtocolError(
        f"the archive that the sandbox sent was refused: {shown_name(name)}: {reason}",
        code="unsafe_archive",
        hint="what came before it was unpacked; do not trust this sandbox, or copy single files",
    )


class FolderWriter:
    """A tar stream becomes files below ``target``, which exists. Use as a context manager; ``feed``, then ``finish``.

    Raises GuestProtocolError (``unsafe_archive``, ``broken_archive``), ConflictError when something stands where
    something of another kind must go, DiskFullError, HostError.
    """

    def __init__(self, target: Path, limits: UnpackLimits | None = None) -> None:
        self.report = UnpackReport()
        self._target = target
        self._limits = limits or UnpackLimits()
        self._entry_count = 0
        self._stated_bytes = 0
        self._member: TarMember | None = None
        self._file: int | None = None
        self._made_inodes: set[int] = set()
        self._folder: tuple[tuple[bytes, ...], int] | None = None
        self._reader = TarReader(self)
        with _local_errors(bytes(target)):
            self._root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors. May be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._forget_folder()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def feed(self, chunk: bytes) -> None:
        self._reader.feed(chunk)

    def finish(self) -> UnpackReport:
        self._reader.finish()
        return self.report

    # -- what the reader tells --

    def begin(self, member: TarMember) -> None:
        self._entry_count += 1
        if self._entry_count > self._limits.max_entries:
            raise self._over_limit(f"more than {self._limits.max_entries} entries")
        self._stated_bytes += member.size_bytes
        if self._stated_bytes > self._limits.max_total_bytes:
            raise self._over_limit(f"more than {self._limits.max_total_bytes} bytes")
        parts = _split(member.name)
        self._member = member
        with _local_errors(member.name):
            match member.kind:
                case MemberKind.DIRECTORY:
                    if parts:
                        self._make_folder(parts, member)
                case _ if not parts:
                    raise refused(member.name, "it would replace the target itself")
                case MemberKind.FILE:
                    self._open_file(parts, member)
                case MemberKind.SYMLINK:
                    self._make_symlink(parts, member)
                case MemberKind.HARD_LINK:
                    self._make_hard_link(parts, member)
                case MemberKind.DEVICE | MemberKind.FIFO | MemberKind.OTHER:
                    self.report.skip(b"/".join(parts), f"a {member.kind.value} is not copied")

    def write(self, data: memoryview) -> None:
        if self._file is None or self._member is None:
            return
        with _local_errors(self._member.name):
            while len(data) > 0:
                data = data[os.write(self._file, data) :]

    def end(self) -> None:
        member, self._member = self._member, None
        if self._file is None or member is None:
            return
        with _local_errors(member.name):
            stamp = int(member.modified_at_seconds * 1_000_000_000)
            os.utime(self._file, ns=(stamp, stamp))
            os.close(self._file)
            self._file = None
        self.report.file_count += 1
        self.report.content_bytes += member.size_bytes

    # -- placing --

    def _make_folder(self, parts: tuple[bytes, ...], member: TarMember) -> None:
        # The owner keeps all rights: what follows must go into it, and the user must be able to remove it again.
        mode = (member.mode & 0o777) | 0o700
        parent = self._open_folder(parts[:-1])
        try:
            os.mkdir(parts[-1], mode, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(parts[-1], dir_fd=parent).st_mode):
                raise _in_the_way(member.name, "something that is no folder") from None
            return
        self.report.folder_count += 1

    def _open_file(self, parts: tuple[bytes, ...], member: TarMember) -> None:
        parent = self._open_folder(parts[:-1])
        self._clear_way(parent, parts[-1], member.name)
        # Written under its own name at once: an interrupted copy of a folder is a part of the folder in any case.
        self._file = os.open(parts[-1], _FILE_FLAGS, (member.mode & 0o777) | 0o400, dir_fd=parent)
        self._made_inodes.add(os.fstat(self._file).st_ino)

    def _make_symlink(self, parts: tuple[bytes, ...], member: TarMember) -> None:
        reason = self._why_link_leads_outside(parts, member.link_target)
        if reason:
            self.report.skip(b"/".join(parts), f"a link to {shown_name(member.link_target)}: {reason}")
            return
        parent = self._open_folder(parts[:-1])
        self._clear_way(parent, parts[-1], member.name)
        os.symlink(member.link_target, parts[-1], dir_fd=parent)
        self.report.link_count += 1

    def _why_link_leads_outside(self, parts: tuple[bytes, ...], target: bytes) -> str:
        """Empty when the link stays inside, now and whatever is unpacked later.

        ``..`` may stand only at the beginning, where the folders are known to be real ones: ``a/..`` can lead
        anywhere if ``a`` is a link. So every link resolves below the target, step by step, through links that do so.
        """
        if not target or b"\0" in target or len(target) >= _PATH_MAX_BYTES:
            return "no valid target"
        if target.startswith(b"/"):
            return "it leads outside of the folder"
        steps = [each for each in target.split(b"/") if each not in (b"", b".")]
        ups = 0
        while ups < len(steps) and steps[ups] == b"..":
            ups += 1
        downs = steps[ups:]
        if b".." in downs:
            return "it goes back up on its way"
        start = parts[:-1]
        if ups > len(start):
            return "it leads outside of the folder"
        if self._passes_link((*start[: len(start) - ups], *downs)):
            return "it leads through another link"
        return ""

    def _passes_link(self, parts: tuple[bytes, ...]) -> bool:
        """Whether one of the names on the way (or the last) is a link already: the user's own may lead anywhere."""
        folder = os.dup(self._root)
        try:
            for part in parts:
                try:
                    found = os.lstat(part, dir_fd=folder)
                    if stat.S_ISLNK(found.st_mode):
                        return True
                    if not stat.S_ISDIR(found.st_mode):
                        return False
                    inner = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
                except (FileNotFoundError, PermissionError):
                    return False
                os.close(folder)
                folder = inner
        finally:
            os.close(folder)
        return False

    def _make_hard_link(self, parts: tuple[bytes, ...], member: TarMember) -> None:
        source = _split(member.link_target)
        if not source:
            raise refused(member.name, "a hard link to nothing")
        if source == parts:
            return
        # Descriptors of both folders are needed at once, and the kept one is replaced by the next.
        source_folder = os.dup(self._open_folder(source[:-1]))
        try:
            try:
                found = os.lstat(source[-1], dir_fd=source_folder)
            except FileNotFoundError:
                self.report.skip(
                    b"/".join(parts), f"a hard link to {shown_name(member.link_target)}, which did not come before"
                )
                return
            if not stat.S_ISREG(found.st_mode) or found.st_ino not in self._made_inodes:
                raise refused(member.name, "a hard link to something that is not of this archive")
            parent = self._open_folder(parts[:-1])
            self._clear_way(parent, parts[-1], member.name)
            os.link(source[-1], parts[-1], src_dir_fd=source_folder, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source_folder)
        self.report.link_count += 1

    def _clear_way(self, parent: int, name: bytes, shown: bytes) -> None:
        """Remove an older file or link of that name, so that nothing is ever written through it."""
        try:
            found = os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            return
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "something that is no file"
            raise _in_the_way(shown, kind)
        os.unlink(name, dir_fd=parent)
        self._made_inodes.discard(found.st_ino)

    def _open_folder(self, parts: tuple[bytes, ...]) -> int:
        """A descriptor of the folder below the root, made if absent; kept until another folder is asked for."""
        if not parts:
            return self._root
        if self._folder is not None and self._folder[0] == parts:
            return self._folder[1]
        folder = os.dup(self._root)
        try:
            for part in parts:
                inner = self._enter(folder, part, parts)
                os.close(folder)
                folder = inner
        except BaseException:
            os.close(folder)
            raise
        self._forget_folder()
        self._folder = (parts, folder)
        return folder

    def _enter(self, folder: int, part: bytes, parts: tuple[bytes, ...]) -> int:
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, 0o777, dir_fd=folder)
            self.report.folder_count += 1
        try:
            return os.open(part, _FOLDER_FLAGS, dir_fd=folder)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                way = b"/".join(parts)
                if stat.S_ISLNK(os.lstat(part, dir_fd=folder).st_mode):
                    raise _in_the_way(way, f"the symbolic link {shown_name(part)}, which is not followed") from error
                raise _in_the_way(way, f"the file {shown_name(part)}") from error
            raise

    def _forget_folder(self) -> None:
        if self._folder is not None:
            os.close(self._folder[1])
            self._folder = None

    def _over_limit(self, what: str) -> GuestProtocolError:
        return GuestProtocolError(
            f"the archive that the sandbox sent was refused: {what}",
            code="archive_too_large",
            hint="raise the limit (atelier cp --max-entries, --max-bytes), or copy a part",
        )


def _split(name: bytes) -> tuple[bytes, ...]:
    """The names on the way to ``name``; raises for what no honest archive of a folder holds."""
    if b"\0" in name or len(name) >= _PATH_MAX_BYTES:
        raise refused(name, "no valid name")
    if name.startswith(b"/"):
        raise refused(name, "an absolute name")
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise refused(name, "a name with '..'")
    if any(len(part) > _NAME_MAX_BYTES for part in parts):
        raise refused(name, "a name of more than 255 bytes")
    return parts


def _in_the_way(name: bytes, what: str) -> ConflictError:
    return ConflictError(
        f"cannot unpack {shown_name(name)}: {what} stands in the way",
        code="target_in_the_way",
        hint="copy into an empty folder",
    )


@contextlib.contextmanager
def _local_errors(name: bytes) -> Generator[None]:
    """What this machine refuses becomes an error that names the file."""
    try:
        yield
    except OSError as error:
        raise local_error(name, "write", error) from error
