"""Volumes as qcow2 overlays: a few hundred KiB at first, growing by what the guest writes, over a read-only base.

Used by the lifecycle in ``local`` mode. Owns ``volumes_dir`` (mode 0700, files 0600: the VMM receives opened
descriptors). It never writes to a base, and relies on bases never changing: images are named by their content, and what
volumes stand over is kept beside them (``backing_files``). Snapshots: ``layers``, ``snapshot_disks``.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from atelier.drivers.storage.backing_files import BackingFiles
from atelier.drivers.storage.layers import Layers
from atelier.drivers.storage.snapshot_disks import SnapshotDisks
from atelier.host.disk_chains import LONGEST_CHAIN, chain_below
from atelier.host.disk_files import find_backing, virtual_size_bytes
from atelier.host.disk_images import create_overlay, grow_image, merge_copies
from atelier.host.files import disk_full_as_error, ensure_private_folder, free_bytes, occupied_bytes, sync_folder
from atelier.model.errors import HostError, InvalidRequestError, NotFoundError
from atelier.model.ids import is_sandbox_id, is_snapshot_id
from atelier.model.layout import DiskLayout
from atelier.model.machine import ROOT_DISK_SERIAL, Disk, DiskFile, SnapshotDisk, VolumeRequest

_SUFFIX = ".qcow2"
_UNFINISHED_SUFFIX = ".qcow2.new"
_MIB = 1024 * 1024


class Qcow2Storage:
    def __init__(self, volumes_dir: Path) -> None:
        self._layout = DiskLayout(volumes_dir.absolute())
        self._backings = BackingFiles(self._layout)
        self._layers = Layers(self._layout)
        self._snapshots = SnapshotDisks(self._layout, self._backings)

    @property
    def name(self) -> str:
        return "qcow2"

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        if present := await self.find_volume(request.sandbox_id):
            return present
        ensure_private_folder(self._layout.root)
        async with self._backings.pinned(request.base, self._pin_of(request)) as base:
            base_bytes = virtual_size_bytes(base)
            size_bytes = request.size_mib * _MIB
            if size_bytes < base_bytes:
                raise InvalidRequestError(
                    f"a disk of {request.size_mib} MiB is too small for the image, which needs "
                    f"{-(-base_bytes // _MIB)} MiB",
                    code="disk_too_small",
                    hint=f"ask for a disk of at least {-(-base_bytes // _MIB)} MiB",
                )
            volume = DiskFile(self._volume(request.sandbox_id), "qcow2")
            unfinished = volume.path.with_suffix(_UNFINISHED_SUFFIX)
            doing = f"creating the volume {volume.path}"
            await create_overlay(unfinished, base, size_bytes, doing=doing)
            with disk_full_as_error(doing):
                # A volume that has its name is whole.
                unfinished.rename(volume.path)
            return Disk(ROOT_DISK_SERIAL, volume, chain_below(self._layout, volume, request.sandbox_id))

    def _pin_of(self, request: VolumeRequest) -> Path:
        path = request.base.path
        if path.parent == self._layout.snapshots:
            return self._layout.origin(request.sandbox_id, _check_snapshot(path.name.removesuffix(_SUFFIX)))
        return self._layout.bases / path.name

    async def find_volume(self, sandbox_id: str) -> Disk | None:
        volume = DiskFile(self._volume(sandbox_id), "qcow2")
        if not volume.path.exists():
            return None
        return Disk(ROOT_DISK_SERIAL, volume, chain_below(self._layout, volume, sandbox_id))

    @property
    def grows_open_volumes(self) -> bool:
        return False

    async def grow_volume(self, sandbox_id: str, size_mib: int) -> None:
        volume = self._volume(sandbox_id)
        if not volume.exists():
            raise NotFoundError(f"there is no volume of sandbox {sandbox_id}", code="volume_not_found")
        self._layers.check_none_under_way(sandbox_id)
        present_bytes = virtual_size_bytes(DiskFile(volume, "qcow2"))
        size_bytes = size_mib * _MIB
        if size_bytes < present_bytes:
            raise InvalidRequestError(
                f"the disk has {present_bytes // _MIB} MiB and cannot shrink to {size_mib} MiB",
                code="disk_cannot_shrink",
                hint="a disk only grows",
            )
        if size_bytes > present_bytes:
            await grow_image(volume, size_bytes, doing=f"growing the volume {volume}")

    async def shorten_volume(self, sandbox_id: str) -> None:
        volume = DiskFile(self._volume(sandbox_id), "qcow2")
        if not volume.path.exists():
            raise NotFoundError(f"there is no volume of sandbox {sandbox_id}", code="volume_not_found")
        self._layers.check_none_under_way(sandbox_id)
        chain = chain_below(self._layout, volume, sandbox_id)
        private = [file for file in chain if self._layout.is_layer(file.path)]
        if private:
            unfinished = volume.path.with_suffix(_UNFINISHED_SUFFIX)
            doing = f"merging the files of the volume {volume.path}"
            await merge_copies([volume, *private], chain[len(private) :][:1], unfinished, doing=doing)
            with disk_full_as_error(doing):
                unfinished.rename(volume.path)
                # Before what it stood over goes.
                await asyncio.to_thread(sync_folder, self._layout.root)
        self._backings.drop_unused(of_sandbox=sandbox_id)

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        volume = self._volume(sandbox_id)
        for next_top in self._layers.next_tops(sandbox_id):
            next_top.unlink(missing_ok=True)
        volume.unlink(missing_ok=True)
        for unfinished in volume.parent.glob(f"{sandbox_id}{_UNFINISHED_SUFFIX}*"):
            unfinished.unlink(missing_ok=True)
        self._backings.drop_unused()

    async def list_volumes(self) -> list[str]:
        if not self._layout.root.is_dir():
            return []
        names = (entry.name for entry in os.scandir(self._layout.root))
        ids = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        return sorted(sandbox_id for sandbox_id in ids if is_sandbox_id(sandbox_id))

    async def used_bytes(self, sandbox_id: str) -> int:
        file = DiskFile(self._volume(sandbox_id), "qcow2")
        count = 0
        with suppress(FileNotFoundError, HostError):
            for _ in range(LONGEST_CHAIN):
                found = file.path.stat()
                # The disk of a snapshot is this sandbox's when nobody else has it any more.
                if not self._layout.is_origin(file.path) or found.st_nlink == 1:
                    # Source: stat(2): st_blocks counts 512 bytes each, whatever the file system's block size.
                    count += found.st_blocks * 512
                below = find_backing(file)
                if below is None or below.path.parent != self._layout.layers:
                    break
                file = below
        return count

    async def free_bytes(self) -> int:
        ensure_private_folder(self._layout.root)
        return free_bytes(self._layout.root)

    async def begin_layer(self, sandbox_id: str, snapshot_id: str) -> DiskFile:
        self._volume(sandbox_id)
        return await self._layers.begin(sandbox_id, _check_snapshot(snapshot_id))

    async def freeze_layer(self, sandbox_id: str, snapshot_id: str) -> None:
        """The switch has done it: what was the top is not written to any more."""
        self._volume(sandbox_id)
        _check_snapshot(snapshot_id)

    async def end_layer(self, sandbox_id: str, snapshot_id: str, *, switched: bool) -> None:
        self._volume(sandbox_id)
        await self._layers.end(sandbox_id, _check_snapshot(snapshot_id), switched=switched)

    async def ensure_snapshot_disk(self, snapshot_id: str, sandbox_id: str) -> SnapshotDisk:
        self._volume(sandbox_id)
        return await self._snapshots.ensure(_check_snapshot(snapshot_id), sandbox_id)

    async def find_snapshot_disk(self, snapshot_id: str) -> Disk | None:
        return self._snapshots.find(_check_snapshot(snapshot_id))

    async def verify_snapshot_disk(self, snapshot_id: str) -> None:
        await self._snapshots.verify(_check_snapshot(snapshot_id))

    async def export_snapshot_disk(self, snapshot_id: str, target: Path) -> str:
        return await self._snapshots.export(_check_snapshot(snapshot_id), target)

    async def import_snapshot_disk(self, snapshot_id: str, source: Path, base: DiskFile, checksum: str) -> SnapshotDisk:
        return await self._snapshots.ensure_imported(_check_snapshot(snapshot_id), source, base, checksum)

    async def ensure_snapshot_disk_absent(self, snapshot_id: str) -> None:
        self._snapshots.ensure_absent(_check_snapshot(snapshot_id))

    async def snapshot_used_bytes(self, snapshot_id: str) -> int:
        return occupied_bytes(self._layout.snapshot_disk(_check_snapshot(snapshot_id)))

    async def list_snapshot_disks(self) -> list[str]:
        return self._snapshots.list()

    def _volume(self, sandbox_id: str) -> Path:
        if not is_sandbox_id(sandbox_id):
            raise InvalidRequestError(f"{sandbox_id!r} is not a sandbox id", code="invalid_id")
        return self._layout.volume(sandbox_id)


def _check_snapshot(snapshot_id: str) -> str:
    if not is_snapshot_id(snapshot_id):
        raise InvalidRequestError(f"{snapshot_id!r} is not a snapshot id", code="invalid_id")
    return snapshot_id
