"""``atelier cp`` at work: which side is the sandbox, where a copy lands, and the copy itself.

Called by ``commands/cp.py``. The rules are those of ``cp -r``: into a folder that exists, else under the new name;
``SOURCE/.`` means the content of a folder.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from atelier.client.folder_writer import UnpackLimits
from atelier.client.local_files import read_pieces
from atelier.client.sandbox import Sandbox
from atelier.model.errors import ConflictError, HostError, InvalidRequestError, NotFoundError
from atelier.model.guest import EntryType

STANDARD_STREAM = "-"
_REFERENCE = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """``sandbox:path``; the path in bytes, as the user's shell gave it."""

    sandbox: str
    path: bytes

    @property
    def name(self) -> bytes:
        """What a copy of it is called; empty for ``/``, ``.`` and the like, whose name is not known here."""
        name = self.path.rstrip(b"/").rpartition(b"/")[2]
        return b"" if name in (b".", b"..", b"~") else name

    @property
    def means_content(self) -> bool:
        return self.path in (b".", b"/") or self.path.endswith((b"/.", b"/.."))

    @property
    def must_be_folder(self) -> bool:
        return self.path.endswith((b"/", b"/.", b"/..")) or self.path in (b".", b"..")


@dataclass(slots=True)
class CopySummary:
    """What was copied. ``skipped``: (name, reason) of what was left out; ``skipped_count`` counts all of them."""

    source: str
    destination: str
    file_count: int = 0
    content_bytes: int = 0
    skipped: list[tuple[bytes, str]] = field(default_factory=list[tuple[bytes, str]])
    skipped_count: int = 0


ProgressReporter = Callable[[int], None]


def parse_place(text: str) -> RemotePlace | str:
    """``SANDBOX:PATH`` (an empty path: the home folder), ``-``, or a local path.

    A local path with a colon is written ``./a:b``.
    """
    reference, separator, path = text.partition(":")
    if separator and _REFERENCE.fullmatch(reference):
        return RemotePlace(reference, os.fsencode(path) or b".")
    return text


def join_remote(folder: bytes, name: bytes) -> bytes:
    if folder == b".":
        return name
    return folder + name if folder.endswith(b"/") else folder + b"/" + name


def remote_kind(sandbox: Sandbox, path: bytes, user: str) -> EntryType | None:
    """What stands there, links followed; None if nothing."""
    try:
        entry = sandbox.files.stat(path, user=user)
    except NotFoundError as error:
        if error.code == "sandbox_not_found":
            raise
        return None
    if entry.type is not EntryType.SYMLINK:
        return entry.type
    try:
        # Whether it leads to a folder is the guest's to say.
        sandbox.files.stat(join_remote(path, b"."), user=user)
    except (NotFoundError, InvalidRequestError, ConflictError):
        return EntryType.FILE
    return EntryType.DIRECTORY


def upload(sandbox: Sandbox, source: str, target: RemotePlace, user: str, on_progress: ProgressReporter) -> CopySummary:
    """Copy a local file or folder, or stdin, into the sandbox."""
    if source == STANDARD_STREAM:
        if target.must_be_folder or not target.name:
            raise InvalidRequestError("stdin has no name of its own", hint="name the file: atelier cp - box:notes.txt")
        entry = sandbox.files.write(target.path, read_pieces(sys.stdin.buffer, on_progress), user=user)
        return CopySummary(source, _shown(target), 1, entry.size_bytes)
    local = Path(source)
    if not local.exists():
        raise HostError(f"there is no {source}", code="local_file_error", hint="check the local path")
    kind = remote_kind(sandbox, target.path, user)
    name = os.fsencode(local.absolute().name)
    destination = target.path
    if kind is EntryType.DIRECTORY or (target.must_be_folder and not local.is_dir()):
        means_content = source.endswith(("/.", "/..")) or source in (".", "..")
        destination = target.path if means_content or not name else join_remote(target.path, name)
    place = RemotePlace(target.sandbox, destination)
    if local.is_dir():
        if kind is not None and kind is not EntryType.DIRECTORY:
            raise ConflictError(
                f"{_shown(target)} is no folder", code="target_in_the_way", hint="a folder cannot replace a file"
            )
        packed = sandbox.files.upload_folder(local, destination, user=user, on_progress=on_progress)
        return CopySummary(
            source, _shown(place), packed.file_count, packed.content_bytes, packed.skipped[:100], len(packed.skipped)
        )
    entry = sandbox.files.upload(local, destination, user=user, on_progress=on_progress)
    return CopySummary(source, _shown(place), 1, entry.size_bytes)


def download(
    sandbox: Sandbox, source: RemotePlace, target: str, user: str, limits: UnpackLimits, on_progress: ProgressReporter
) -> CopySummary:
    """Copy a file or folder out of the sandbox, to a local path or stdout (a folder as a tar stream)."""
    kind = remote_kind(sandbox, source.path, user)
    if kind is None:
        raise NotFoundError(
            f"there is no {_shown(source)}", code="path_not_found", hint="look with: atelier exec ... ls"
        )
    if target == STANDARD_STREAM:
        return _download_to_stdout(sandbox, source, kind, user, on_progress)
    local = Path(target)
    # Only a name that the user wrote is used here, never one that the sandbox tells.
    name = os.fsdecode(source.name)
    if kind is EntryType.DIRECTORY:
        if local.is_dir() and name and not source.means_content:
            local = _inside(local, name)
        report = sandbox.files.download_folder(source.path, local, user=user, limits=limits, on_progress=on_progress)
        return CopySummary(
            _shown(source), str(local), report.file_count, report.content_bytes, report.skipped, report.skipped_count
        )
    if local.is_dir() or target.endswith("/"):
        if not local.is_dir():
            raise HostError(f"there is no folder {target}", code="local_file_error", hint=f"make it: mkdir -p {target}")
        local = _inside(local, name)
    moved = _Counter(on_progress)
    sandbox.files.download(source.path, local, user=user, on_progress=moved)
    return CopySummary(_shown(source), str(local), 1, moved.total_bytes)


def _inside(folder: Path, name: str) -> Path:
    """``folder/name``, where a link of that name is not followed: it may be an older copy's, out of a sandbox."""
    path = folder / name
    if path.is_symlink():
        raise ConflictError(
            f"{path} is a symbolic link", code="target_in_the_way", hint="remove it, or name the destination in full"
        )
    return path


def _download_to_stdout(
    sandbox: Sandbox, source: RemotePlace, kind: EntryType, user: str, on_progress: ProgressReporter
) -> CopySummary:
    is_folder = kind is EntryType.DIRECTORY
    if is_folder and sys.stdout.isatty():
        raise InvalidRequestError("a folder comes as a tar stream, which no terminal shows", hint="add: | tar tv")
    stream = sandbox.files.stream_archive if is_folder else sandbox.files.stream
    moved = _Counter(on_progress)
    sys.stdout.flush()
    with stream(source.path, user=user) as chunks:
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
            moved(len(chunk))
        sys.stdout.buffer.flush()
    return CopySummary(_shown(source), STANDARD_STREAM, 0 if is_folder else 1, moved.total_bytes)


class _Counter:
    def __init__(self, then: ProgressReporter) -> None:
        self.total_bytes = 0
        self._then = then

    def __call__(self, byte_count: int) -> None:
        self.total_bytes += byte_count
        self._then(byte_count)


def _shown(place: RemotePlace) -> str:
    return f"{place.sandbox}:{place.path.decode('utf-8', 'backslashreplace')}"
