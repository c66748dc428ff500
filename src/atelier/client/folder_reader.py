"""Turns a folder of this machine into a tar stream on the fly, for folder uploads.

Called by ``files.py``. Names are kept byte by byte (GNU form, which has no charset); links are stored as links, never
followed; owners are left out; sockets, fifos and devices are skipped and reported. Nothing is buffered but one piece.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from atelier.client.local_errors import local_error
from atelier.model.errors import ConflictError

_CHUNK_BYTES = 256 * 1024
_BLOCK_BYTES = 512


@dataclass(slots=True)
class PackReport:
    """What was sent. ``skipped``: (name, reason)."""

    file_count: int = 0
    folder_count: int = 0
    link_count: int = 0
    content_bytes: int = 0
    skipped: list[tuple[bytes, str]] = field(default_factory=list[tuple[bytes, str]])


def pack_folder(source: Path, report: PackReport, on_progress: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The content of ``source`` as an uncompressed tar stream, names relative to it. Fills ``report`` on the way.

    Raises HostError for what cannot be read, ConflictError for a file that shrinks while it is read.
    """
    pending: list[bytes] = [b""]
    root = bytes(source)
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(_join(root, folder)) as found:
                entries = sorted(found, key=lambda each: each.name)
        except OSError as error:
            raise local_error(_join(root, folder), "read", error) from error
        for entry in entries:
            name = _join(folder, entry.name)
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # removed since the folder was listed
            except OSError as error:
                raise local_error(entry.path, "read", error) from error
            if stat.S_ISDIR(status.st_mode):
                report.folder_count += 1
                pending.append(name)
                yield _header(name, status, tarfile.DIRTYPE)
            elif stat.S_ISLNK(status.st_mode):
                report.link_count += 1
                yield _header(name, status, tarfile.SYMTYPE, _link_target(entry.path))
            elif stat.S_ISREG(status.st_mode):
                yield from _pack_file(entry.path, name, report, on_progress)
            else:
                report.skipped.append((name, "no file, folder or link"))
    yield bytes(2 * _BLOCK_BYTES)


def _pack_file(
    path: bytes, name: bytes, report: PackReport, on_progress: Callable[[int], None] | None
) -> Iterator[bytes]:
    try:
        # NONBLOCK: should a fifo have taken the file's place meanwhile, opening it must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise local_error(path, "read", error) from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            report.skipped.append((name, "no file any more"))
            return
        yield _header(name, status, tarfile.REGTYPE)
        # Exactly the length that the header states: a file that grows meanwhile is cut there.
        remaining = status.st_size
        while remaining > 0:
            try:
                chunk = file.read(min(_CHUNK_BYTES, remaining))
            except OSError as error:
                raise local_error(path, "read", error) from error
            if not chunk:
                raise ConflictError(
                    f"{os.fsdecode(path)!r} became shorter while it was copied",
                    code="file_changed",
                    hint="copy again when nothing writes to the folder",
                )
            remaining -= len(chunk)
            yield chunk
            if on_progress is not None:
                on_progress(len(chunk))
        if padding := -status.st_size % _BLOCK_BYTES:
            yield bytes(padding)
        report.file_count += 1
        report.content_bytes += status.st_size


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder and name else folder or name


def _link_target(path: bytes) -> bytes:
    return os.readlink(path)  # noqa: PTH115  pathlib would tidy the target up; it is kept byte by byte


def _header(name: bytes, status: os.stat_result, kind: bytes, link_target: bytes = b"") -> bytes:
    member = tarfile.TarInfo(os.fsdecode(name))
    member.type = kind
    member.mode = stat.S_IMODE(status.st_mode)
    member.mtime = max(0, int(status.st_mtime))
    member.size = status.st_size if kind == tarfile.REGTYPE else 0
    member.linkname = os.fsdecode(link_target)
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
