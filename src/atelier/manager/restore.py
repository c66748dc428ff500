"""``atelier restore FILE``: brings a backup back into the data folder, from which everything else is derived.

Called by ``manager.backup_commands``, with no manager running. Everything is unpacked beside its place and checked
before anything changes. Then, in this order: disks that are not there yet, the key if there is none, and last the
database, by one rename: whatever instant this ends at, the folder holds the old state or the new one, and disks that
belong to neither stay. A disk that exists is never touched; the database that was there is kept under another name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from atelier.db.closed_files import find_newest_event_id, fold_log_in, mark_restored, read_sandboxes
from atelier.db.examination import Examined, examine
from atelier.host.disk_files import find_backing, set_backing_file
from atelier.host.files import ensure_private_folder, lock_folder, refusal_as_error, sync_folder
from atelier.host.sparse_files import write_sparsely
from atelier.manager.backup_archive import (
    BASE_NAME,
    DATABASE,
    FORMAT_VERSION,
    MANIFEST,
    TOKEN,
    VOLUME_NAME,
    ArchiveReader,
    Manifest,
    VolumeEntry,
)
from atelier.model.errors import AlreadyRunningError, HostError, InvalidRequestError, NotFoundError
from atelier.model.layout import DataLayout
from atelier.model.machine import DiskFile
from atelier.model.states import SandboxState

_STAGING_PREFIX = ".restoring-"
_WITHOUT_DISK = frozenset({SandboxState.CREATING, SandboxState.DESTROYING, SandboxState.FAILED})
"""States in which a sandbox may rightly have none."""


@dataclass(slots=True)
class Restored:
    """What was done. ``replaced``: where the database that was there is now; disks are named by their sandbox;
    ``without_disk``: sandboxes of the backup that have none here; ``unowned_disks``: files that none of them owns."""

    manifest: Manifest
    replaced: Path | None = None
    key_kept: bool = False
    disks_restored: list[str] = field(default_factory=list[str])
    disks_kept: list[str] = field(default_factory=list[str])
    without_disk: list[str] = field(default_factory=list[str])
    unowned_disks: list[str] = field(default_factory=list[str])


def restore_backup(data: DataLayout, archive: Path) -> Restored:
    """Raises NotFoundError, InvalidRequestError (``backup_damaged``), AlreadyRunningError, HostError
    (``database_too_new``, ``database_busy``), DiskFullError."""
    if not archive.is_file():
        raise NotFoundError(f"there is no backup file {archive}", code="file_not_found", hint="check the name")
    with refusal_as_error(f"restoring {archive} into {data.root}"):
        ensure_private_folder(data.root)
        try:
            lock = lock_folder(data.lock_file)
        except AlreadyRunningError as error:
            raise AlreadyRunningError(
                f"{archive} cannot be restored while a manager runs: {error.message}",
                hint="stop it first (Ctrl-C where `atelier up` runs), then restore",
            ) from error
        with lock:
            for left_over in data.root.glob(f"{_STAGING_PREFIX}*"):
                shutil.rmtree(left_over)
            with tempfile.TemporaryDirectory(prefix=_STAGING_PREFIX, dir=data.root) as name:
                return _Restore(data, archive, Path(name)).run()


class _Restore:
    def __init__(self, data: DataLayout, archive: Path, staging: Path) -> None:
        self._data = data
        self._archive = archive
        self._staging = staging

    def run(self) -> Restored:
        manifest = self._unpack()
        self._check_database(manifest)
        present = self._examine_present()
        self._prepare_database(manifest)
        included = [entry for entry in manifest.volumes if not entry.left_out]
        self._prepare_disks(included)

        restored = Restored(manifest)
        self._place_disks(included, restored)
        restored.key_kept = not self._place_token() and self._data.token_file.exists()
        restored.replaced = self._replace_database(present)
        self._compare_disks(restored)
        return restored

    # Nothing outside of the staging folder changes in these.

    def _unpack(self) -> Manifest:
        manifest = None
        with self._archive.open("rb") as file:
            reader = ArchiveReader(self._archive, file)
            for folder in ("bases", "volumes"):
                (self._staging / folder).mkdir(mode=0o700)
            for name, _, pieces in reader.members():
                if manifest is not None:
                    raise reader.damaged("the manifest is not its last file")
                if name == MANIFEST:
                    manifest = self._read_manifest(reader, b"".join(pieces))
                else:
                    self._write(name, pieces)
        if manifest is None or not (self._staging / DATABASE).exists():
            raise reader.damaged("its database or its manifest is missing")
        return manifest

    def _read_manifest(self, reader: ArchiveReader, document: bytes) -> Manifest:
        try:
            manifest = Manifest.model_validate_json(document)
        except ValidationError as error:
            raise reader.damaged(f"its manifest is not understood ({error.errors()[0]['msg']})") from error
        if manifest.format_version > FORMAT_VERSION:
            raise InvalidRequestError(
                f"{self._archive} cannot be restored: a newer Atelier ({manifest.atelier_version}) made it",
                code="backup_too_new",
                hint="install that version, then restore; nothing was changed",
            )
        for entry in manifest.volumes:
            if entry.left_out:
                continue
            names = [f"volumes/{entry.sandbox_id}.qcow2", *([f"bases/{entry.base}"] if entry.base else [])]
            for name, form in zip(names, (VOLUME_NAME, BASE_NAME), strict=False):
                if form.fullmatch(name) is None or not (self._staging / name).exists():
                    raise reader.damaged(f"{name!r} is missing in it")
        return manifest

    def _write(self, name: str, pieces: Iterator[bytes]) -> None:
        path = self._staging / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            write_sparsely(file, pieces)
            file.flush()
            os.fsync(file.fileno())

    def _check_database(self, manifest: Manifest) -> None:
        staged = self._staging / DATABASE
        try:
            found = examine(staged, thorough=True)
        except HostError as error:
            # Its own hint tells of the data folder's database.
            words = error.message.replace(str(staged), "in it")
            hint = "nothing was changed; take another backup file"
            if error.code == "database_too_new":
                hint = f"nothing was changed; install Atelier {manifest.atelier_version} or newer, then restore"
            raise HostError(f"{self._archive} cannot be restored: {words}", code=error.code, hint=hint) from error
        if found != Examined(manifest.schema_revision, manifest.installation_id):
            raise InvalidRequestError(
                f"{self._archive} cannot be restored: its database is not the one that its manifest tells of",
                code="backup_damaged",
                hint="nothing was changed; take another backup file",
            )

    def _examine_present(self) -> bool:
        """Whether there is a database that is whole, so that its log can be folded into it."""
        if not os.path.lexists(self._data.database):
            return False
        if self._data.database.is_dir():
            raise HostError(
                f"{self._data.database} is a folder, and the database belongs there",
                code="database_unusable",
                hint="move it away, then restore",
            )
        try:
            examine(self._data.database)
        except HostError as error:
            if error.code not in ("database_too_new", "database_damaged"):
                raise
            return error.code == "database_too_new"
        return True

    def _prepare_database(self, manifest: Manifest) -> None:
        staged = self._staging / DATABASE
        newest = find_newest_event_id(self._data.database) if self._data.database.exists() else 0
        mark_restored(staged, beyond_event_id=newest, backup_made_at=manifest.created_at)
        _sync(staged)

    def _prepare_disks(self, included: list[VolumeEntry]) -> None:
        for entry in included:
            staged = self._staging / "volumes" / f"{entry.sandbox_id}.qcow2"
            backing = find_backing(DiskFile(staged, "qcow2"))
            if (backing is None) != (not entry.base):
                raise HostError(
                    f"{self._archive} cannot be restored: the disk of {entry.name} is not the one its manifest tells of",
                    code="backup_damaged",
                    hint="nothing was changed; take another backup file",
                )
            if entry.base:
                base = self._data.disks.bases.absolute() / entry.base
                if base.exists() and base.stat().st_size != (self._staging / "bases" / entry.base).stat().st_size:
                    raise HostError(
                        f"{self._archive} cannot be restored: {base} is another image than the one of this name in it",
                        code="base_differs",
                        hint="nothing was changed; restore into another data folder",
                    )
                set_backing_file(staged, base)

    # From here on the data folder changes.

    def _place_disks(self, included: list[VolumeEntry], restored: Restored) -> None:
        if not included:
            return
        ensure_private_folder(self._data.volumes)
        ensure_private_folder(self._data.disks.bases)
        for base in sorted({entry.base for entry in included if entry.base}):
            staged = self._staging / "bases" / base
            staged.chmod(0o444)
            _place(staged, self._data.disks.bases / base)
        sync_folder(self._data.disks.bases)
        for entry in included:
            staged = self._staging / "volumes" / f"{entry.sandbox_id}.qcow2"
            placed = _place(staged, self._data.disks.volume(entry.sandbox_id))
            (restored.disks_restored if placed else restored.disks_kept).append(entry.name)
        sync_folder(self._data.volumes)

    def _place_token(self) -> bool:
        """A key that is there stays: programs of this machine hold it, and an older one may have been given up."""
        staged = self._staging / TOKEN
        placed = staged.exists() and _place(staged, self._data.token_file)
        sync_folder(self._data.root)
        return placed

    def _replace_database(self, whole: bool) -> Path | None:
        database = self._data.database
        replaced = None
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = database.with_name(f"{database.name}.replaced-{stamp}")
        for other in database.parent.glob(f"{database.name}.replaced-*"):
            # The second name that a restore gave it which did not come to its end.
            if database.exists() and other.samefile(database):
                other.unlink()
        if whole:
            fold_log_in(database)
        else:
            # What is damaged keeps every byte, its log included: SQLite finds that under the new name as well. The log
            # goes first, since beside the restored database it would be taken for that one's.
            with suppress(FileNotFoundError):
                Path(f"{database}-wal").rename(f"{aside}-wal")
                replaced = Path(f"{aside}-wal")
        if database.exists():
            # A second name first: at no instant is there no database.
            aside.hardlink_to(database)
            replaced = aside
            sync_folder(database.parent)
        Path(f"{database}-shm").unlink(missing_ok=True)
        (self._staging / DATABASE).rename(database)
        sync_folder(database.parent)
        return replaced

    def _compare_disks(self, restored: Restored) -> None:
        sandboxes = read_sandboxes(self._data.database)
        restored.without_disk = [
            each.name
            for each in sandboxes
            if each.state not in _WITHOUT_DISK and not self._data.disks.volume(each.id).exists()
        ]
        owned = {self._data.disks.volume(each.id).name for each in sandboxes}
        found = {path.name for path in self._data.volumes.glob("*.qcow2")}
        restored.unowned_disks = sorted(found - owned)


def _place(staged: Path, target: Path) -> bool:
    """Give a finished file its name unless that is taken: False then."""
    try:
        target.hardlink_to(staged)
    except FileExistsError:
        return False
    staged.unlink()
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
