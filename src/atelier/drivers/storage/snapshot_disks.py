"""The disks of snapshots: copies of what was frozen, which volumes and other snapshots' disks stand over.

Used by ``qcow2``. A copy, because the VMM of the sandbox that was snapshotted can still write to the frozen layer, and
others are to read it. A disk that has its name is whole, read-only and has its checksum beside it. A deleted one lives
on under the names that ``backing_files`` keeps, for as long as something stands over it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from atelier.drivers.storage.backing_files import BackingFiles
from atelier.drivers.storage.layers import is_same_file
from atelier.host.disk_chains import chain_below
from atelier.host.disk_files import missing_disk_file
from atelier.host.disk_images import merge_copies
from atelier.host.file_copies import sha256_of_file
from atelier.host.file_pins import ensure_pinned
from atelier.host.files import (
    disk_full_as_error,
    ensure_private_folder,
    occupied_bytes,
    sync_folder,
    write_atomically,
)
from atelier.host.threads import run_in_thread
from atelier.model.errors import ConflictError, HostError, NotFoundError
from atelier.model.ids import is_snapshot_id
from atelier.model.layout import DiskLayout
from atelier.model.machine import ROOT_DISK_SERIAL, Disk, DiskFile, SnapshotDisk

_LONGEST_CHAIN = 4
"""Files of one snapshot's disk. A volume over it has one more, and must be frozen a few times before it is too long."""
_SUFFIX = ".qcow2"
_LAYER_SUFFIX = ".qcow2.layer"


class SnapshotDisks:
    def __init__(self, layout: DiskLayout, backings: BackingFiles) -> None:
        self._layout = layout
        self._backings = backings

    async def ensure(self, snapshot_id: str, sandbox_id: str) -> SnapshotDisk:
        """See ``StorageDriver.ensure_snapshot_disk``."""
        path, layer = self._layout.snapshot_disk(snapshot_id), self._layout.snapshot_layer(snapshot_id)
        if not path.exists():
            if not layer.exists():
                raise NotFoundError(f"no volume was frozen for snapshot {snapshot_id}", code="layer_not_found")
            next_top = self._layout.next_top(sandbox_id, snapshot_id)
            if next_top.exists() or is_same_file(layer, self._layout.volume(sandbox_id)):
                raise ConflictError(
                    f"the volume of sandbox {sandbox_id} is just being frozen for snapshot {snapshot_id}",
                    code="layer_under_way",
                    hint="make its disk when that is through",
                )
            await self._make(path, DiskFile(layer, "qcow2"), sandbox_id)
        layer.unlink(missing_ok=True)
        self._backings.drop_unused()
        return self._get(snapshot_id)

    async def export(self, snapshot_id: str, target: Path) -> str:
        """See ``StorageDriver.export_snapshot_disk``."""
        disk = self.find(snapshot_id)
        if disk is None:
            raise _no_disk(snapshot_id)
        if len(disk.backing) != 1:
            raise ConflictError(
                f"the disk of snapshot {snapshot_id} stands over another snapshot's", code="snapshot_disk_not_alone"
            )
        await run_in_thread(lambda given_up: ensure_pinned(disk.top.path, target, given_up=given_up))
        return self._read_checksum(snapshot_id)

    async def ensure_imported(self, snapshot_id: str, source: Path, base: DiskFile, checksum: str) -> SnapshotDisk:
        """See ``StorageDriver.import_snapshot_disk``."""
        path = self._layout.snapshot_disk(snapshot_id)
        if not path.exists():
            for folder in (self._layout.root, self._layout.snapshots):
                ensure_private_folder(folder)
            async with self._backings.pinned(base, self._pin_of(base)) as pin:
                await self._import(path, DiskFile(source, "qcow2"), pin, checksum)
        return self._get(snapshot_id)

    async def _import(self, path: Path, source: DiskFile, base: DiskFile, checksum: str) -> None:
        doing = f"making the snapshot disk {path}"
        try:
            found = await run_in_thread(lambda given_up: sha256_of_file(source.path, given_up=given_up))
        except FileNotFoundError as error:
            raise missing_disk_file(source.path) from error
        if found != checksum:
            raise HostError(f"{source.path} is not what was written there", code="disk_file_damaged")
        unfinished = path.with_name(f"{path.name}.new")
        # A copy of its own, since another name is to be written into it.
        await merge_copies([source], [base], unfinished, doing=doing)
        await self._publish(unfinished, path, doing)

    def _get(self, snapshot_id: str) -> SnapshotDisk:
        disk = self.find(snapshot_id)
        assert disk is not None, "it was just made"
        return SnapshotDisk(disk, occupied_bytes(disk.top.path), self._read_checksum(snapshot_id))

    async def _make(self, path: Path, layer: DiskFile, sandbox_id: str) -> None:
        chain = chain_below(self._layout, layer, sandbox_id)
        private = [file for file in chain if self._layout.is_layer(file.path)]
        below = chain[len(private) :]
        if not below:
            raise HostError(f"{layer.path} stands over no image", code="disk_file_damaged")
        async with self._backings.pinned(below[0], self._pin_of(below[0])) as nearest:
            over = [nearest, *below[1:]]
            unfinished = path.with_name(f"{path.name}.new")
            doing = f"making the snapshot disk {path}"
            # Beyond the limit it stands over the image alone.
            merged = over if 1 + len(over) > _LONGEST_CHAIN else over[:1]
            await merge_copies([layer, *private], merged, unfinished, doing=doing)
            await self._publish(unfinished, path, doing)

    async def _publish(self, unfinished: Path, path: Path, doing: str) -> None:
        try:
            checksum = await run_in_thread(lambda given_up: sha256_of_file(unfinished, given_up=given_up))
            with disk_full_as_error(doing):
                unfinished.chmod(0o400)
                write_atomically(self._layout.snapshot_checksum(path.stem), f"{checksum}\n".encode())
                unfinished.rename(path)
                await asyncio.to_thread(sync_folder, path.parent)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise

    def _pin_of(self, file: DiskFile) -> Path:
        if self._layout.is_origin(file.path):
            return self._layout.snapshot_origin(file.path.stem.partition("-from-")[2])
        return self._layout.bases / file.path.name

    def find(self, snapshot_id: str) -> Disk | None:
        top = DiskFile(self._layout.snapshot_disk(snapshot_id), "qcow2")
        if not top.path.exists():
            return None
        return Disk(ROOT_DISK_SERIAL, top, chain_below(self._layout, top, ""), read_only=True)

    async def verify(self, snapshot_id: str) -> None:
        path = self._layout.snapshot_disk(snapshot_id)
        try:
            found = await run_in_thread(lambda given_up: sha256_of_file(path, given_up=given_up))
        except FileNotFoundError:
            raise _no_disk(snapshot_id) from None
        if found != self._read_checksum(snapshot_id):
            raise HostError(
                f"the disk of snapshot {snapshot_id} is not what it was when it was made",
                code="disk_file_damaged",
                hint="delete the snapshot and take another; check the host's disk",
            )

    def _read_checksum(self, snapshot_id: str) -> str:
        """Empty, as no checksum is, if it is gone."""
        try:
            return self._layout.snapshot_checksum(snapshot_id).read_text().strip()
        except FileNotFoundError:
            return ""

    def ensure_absent(self, snapshot_id: str) -> None:
        """See ``StorageDriver.ensure_snapshot_disk_absent``."""
        for path in (self._layout.snapshot_disk(snapshot_id), self._layout.snapshot_layer(snapshot_id)):
            path.unlink(missing_ok=True)
        for left_over in self._layout.snapshots.glob(f"{snapshot_id}.*"):
            left_over.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or not there
            self._layout.snapshots.rmdir()
        self._backings.drop_unused()

    def list(self) -> list[str]:
        if not self._layout.snapshots.is_dir():
            return []
        names = [entry.name for entry in self._layout.snapshots.iterdir()]
        ids = {name.removesuffix(_LAYER_SUFFIX).removesuffix(_SUFFIX) for name in names}
        return sorted(snapshot_id for snapshot_id in ids if is_snapshot_id(snapshot_id))


def _no_disk(snapshot_id: str) -> NotFoundError:
    return NotFoundError(f"snapshot {snapshot_id} has no disk", code="snapshot_disk_not_found")
