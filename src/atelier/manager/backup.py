"""``atelier backup FILE``: database, key and, on request, the disks of sandboxes that do not run, in one file.

Called by ``manager.backup_commands``. Works beside a running manager and without one: it only reads, and never takes
the data folder's lock. The file gets its name when it is whole and on the disk.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from atelier import __version__
from atelier.db.closed_files import StoredSandbox, copy_database, read_sandboxes
from atelier.db.examination import examine
from atelier.host.disk_chains import chain_below
from atelier.host.disk_files import find_backing
from atelier.host.disk_images import merge_copies
from atelier.host.files import refusal_as_error, sync_folder
from atelier.host.sparse_files import read_sparsely
from atelier.manager.backup_archive import (
    BASE_NAME,
    DATABASE,
    FORMAT_VERSION,
    MANIFEST,
    TOKEN,
    ArchiveWriter,
    Manifest,
    VolumeEntry,
)
from atelier.model.errors import AtelierError, ConflictError, HostError, InvalidRequestError, NotFoundError
from atelier.model.layout import DataLayout, DiskLayout
from atelier.model.machine import DiskFile
from atelier.model.states import SandboxState

_AT_REST = frozenset({SandboxState.STOPPED, SandboxState.FAILED})
_NOT_ASKED_FOR = "disks were not asked for"
_CHANGED = "it changed while it was copied"


@dataclass(frozen=True, slots=True)
class Backup:
    """What was written: ``size_bytes`` is the file's."""

    path: Path
    size_bytes: int
    holds_key: bool
    manifest: Manifest


def take_backup(data: DataLayout, images: Path, target: Path, *, with_disks: bool, force: bool) -> Backup:
    """``images``: the folder of the image cache, in which disks may have their bases too.

    Raises NotFoundError (``no_database``), ConflictError (``file_exists``), HostError, DiskFullError.
    """
    _check_target(target, force=force)
    if not os.path.lexists(data.database):
        raise NotFoundError(
            f"there is no database in {data.root}, so nothing to back up",
            code="no_database",
            hint="name the data folder with --data-dir or ATELIER_DATA_DIR",
        )
    with (
        refusal_as_error(f"writing the backup {target}"),
        # Beside the target, where there must be room anyway; closed to others, like all that is made in it.
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name,
    ):
        folder = Path(name)
        database = folder / DATABASE
        copy_database(data.database, database)
        examined = examine(database, thorough=True)
        sandboxes = read_sandboxes(database)
        unfinished = folder / "archive"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            archive = ArchiveWriter(file)
            _add_file(archive, DATABASE, database)
            if holds_key := data.token_file.exists():
                _add_file(archive, TOKEN, data.token_file)
            disks = _Disks(data, images, archive, folder)
            volumes = [entry for each in sandboxes if (entry := disks.enter(each, included=with_disks)) is not None]
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                atelier_version=__version__,
                schema_revision=examined.revision,
                installation_id=examined.installation_id,
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                sandboxes=len(sandboxes),
                volumes=volumes,
            )
            document = manifest.model_dump_json(indent=2).encode() + b"\n"
            archive.add(MANIFEST, len(document), [document])
            archive.close()
            file.flush()
            os.fsync(file.fileno())
            size_bytes = os.fstat(file.fileno()).st_size
        _check_target(target, force=force)
        unfinished.replace(target)
        sync_folder(target.parent)
    return Backup(target, size_bytes, holds_key, manifest)


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise InvalidRequestError(f"{target} is a folder", code="invalid_path", hint="name the file to be written")
    if not target.parent.is_dir():
        raise NotFoundError(f"there is no folder {target.parent}", code="folder_not_found", hint="make it first")
    if os.path.lexists(target) and not force:
        raise ConflictError(
            f"{target} exists already", code="file_exists", hint="choose another name, or replace it with --force"
        )


def _add_file(archive: ArchiveWriter, name: str, path: Path) -> None:
    with _open_regular(path) as descriptor:
        found = os.fstat(descriptor)
        archive.add(name, found.st_size, read_sparsely(descriptor, found.st_size), modified_at=found.st_mtime)


class _Disks:
    """Puts volumes and the images that they need into the archive, each image once. A volume that consists of several
    files, or stands over a snapshot's disk, is made one file over its image first, in ``folder``."""

    def __init__(self, data: DataLayout, images: Path, archive: ArchiveWriter, folder: Path) -> None:
        self._data = data
        self._layout = DiskLayout(data.volumes.absolute())
        self._folder = folder
        self._trusted = (data.disks.bases, images)
        self._archive = archive
        self._bases: dict[str, Path] = {}

    def enter(self, sandbox: StoredSandbox, *, included: bool) -> VolumeEntry | None:
        """The entry of the sandbox's volume, which is in the archive if it may be; None if it has none."""
        path = self._data.disks.volume(sandbox.id)
        try:
            found = path.lstat()
        except FileNotFoundError:
            return None
        entry = VolumeEntry(
            sandbox_id=sandbox.id,
            name=sandbox.name,
            state=sandbox.state,
            size_bytes=found.st_size,
            used_bytes=found.st_blocks * 512,
        )
        base = ""
        if not included:
            reason = _NOT_ASKED_FOR
        elif sandbox.state not in _AT_REST:
            reason = f"it is {sandbox.state}"
        else:
            try:
                base, reason = self._add(sandbox, path)
            except AtelierError as error:
                reason = error.message
        return entry.model_copy(update={"base": base, "left_out": reason})

    def _add(self, sandbox: StoredSandbox, volume: Path) -> tuple[str, str]:
        """The name of the volume's base, and why the copy is not to be used; that is empty if it is whole."""
        with _open_regular(volume) as descriptor:
            before = os.fstat(descriptor)
            backing = find_backing(DiskFile(volume, "qcow2"))
            if backing is None or backing.path.parent != self._layout.layers:
                base = self._add_base(volume)
                self._add_volume(volume)
            else:
                merged = self._folder / volume.name
                try:
                    asyncio.run(self._merge(sandbox, volume, merged))
                    base = self._add_base(merged)
                    self._add_volume(merged)
                finally:
                    merged.unlink(missing_ok=True)
            after = os.fstat(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            return base, _CHANGED
        # A start may have begun meanwhile, and not have written yet.
        now = {each.id: each.state for each in read_sandboxes(self._data.database)}
        return base, "" if now.get(sandbox.id) in _AT_REST else _CHANGED

    async def _merge(self, sandbox: StoredSandbox, volume: Path, merged: Path) -> None:
        top = DiskFile(volume, "qcow2")
        chain = chain_below(self._layout, top, sandbox.id)
        private = [file for file in chain if self._layout.is_layer(file.path)]
        await merge_copies([top, *private], chain[len(private) :], merged, doing=f"copying the volume {volume}")

    def _add_base(self, volume: Path) -> str:
        backing = find_backing(DiskFile(volume, "qcow2"))
        if backing is None:
            return ""
        named = backing.path
        # The header is within a VMM's reach: it must not choose which of the host's files are copied.
        base = named.resolve()
        if not any(base.parent == folder.resolve() for folder in self._trusted):
            raise HostError(f"it stands over {named}, which is neither in {self._trusted[0]} nor in {self._trusted[1]}")
        if BASE_NAME.fullmatch(f"bases/{base.name}") is None or self._bases.get(base.name, base) != base:
            raise HostError(f"the name of its base {base} cannot be kept")
        if base.name not in self._bases:
            _add_file(self._archive, f"bases/{base.name}", base)
            self._bases[base.name] = base
        return base.name

    def _add_volume(self, path: Path) -> None:
        _add_file(self._archive, f"volumes/{path.name}", path)


@contextmanager
def _open_regular(path: Path) -> Generator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", code="file_unreadable") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise HostError(f"{path} is not a plain file", code="file_unreadable")
        yield descriptor
    finally:
        os.close(descriptor)
