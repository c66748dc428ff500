"""Freezing a running sandbox's volume for a snapshot: what was written to so far becomes a layer that is never written
to again, and the machine goes on in an empty overlay over it.

Used by ``qcow2``. The volume gets a second name (the layer), the overlay is made under a name of its own, the VMM is
switched to it by the lifecycle, and then it takes the volume's name. Whatever instant this ends at, ``end`` leads to the
old state or to the new one, and there is always a volume under its name with everything that the guest has written.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from atelier.host.disk_chains import LONGEST_CHAIN, chain_below
from atelier.host.disk_files import is_empty_overlay, virtual_size_bytes
from atelier.host.disk_images import create_overlay
from atelier.host.files import disk_full_as_error, ensure_private_folder, sync_folder
from atelier.model.errors import ConflictError, NotFoundError
from atelier.model.layout import DiskLayout
from atelier.model.machine import DiskFile


class Layers:
    def __init__(self, layout: DiskLayout) -> None:
        self._layout = layout

    async def begin(self, sandbox_id: str, snapshot_id: str) -> DiskFile:
        """The overlay that the VMM is to be switched to; see ``StorageDriver.begin_layer``."""
        volume = DiskFile(self._layout.volume(sandbox_id), "qcow2")
        if not volume.path.exists():
            raise NotFoundError(f"there is no volume of sandbox {sandbox_id}", code="volume_not_found")
        next_top = DiskFile(self._layout.next_top(sandbox_id, snapshot_id), "qcow2")
        self.check_none_under_way(sandbox_id, but=next_top.path)
        if next_top.path.exists():
            return next_top
        if self._layout.snapshot_disk(snapshot_id).exists():
            raise ConflictError(f"snapshot {snapshot_id} has its disk already", code="snapshot_exists")
        if len(chain_below(self._layout, volume, sandbox_id)) + 2 > LONGEST_CHAIN:
            raise ConflictError(
                f"the disk of sandbox {sandbox_id} consists of {LONGEST_CHAIN} files, as many as there may be",
                code="disk_chain_too_long",
                hint="pause and resume the sandbox, or restart it: they are made fewer then",
            )
        doing = f"freezing the volume {volume.path}"
        with disk_full_as_error(doing):
            layer = self._link(volume.path, sandbox_id, snapshot_id)
        unfinished = next_top.path.with_name(f"{next_top.path.name}.new")
        await create_overlay(unfinished, layer, virtual_size_bytes(volume), doing=doing)
        with disk_full_as_error(doing):
            await asyncio.to_thread(_synchronize, unfinished, self._layout.layers, self._layout.snapshots)
            unfinished.rename(next_top.path)
            # What a guest flushes into it must be found after a power cut.
            await asyncio.to_thread(sync_folder, self._layout.root)
        return next_top

    def _link(self, volume: Path, sandbox_id: str, snapshot_id: str) -> DiskFile:
        """The volume under its second name, and under a third by which the snapshot holds it."""
        for folder in (self._layout.layers, self._layout.snapshots):
            ensure_private_folder(folder)
        number, layer = self._newest(sandbox_id, snapshot_id)
        if layer is None or not layer.samefile(volume):
            layer = self._layout.layer(sandbox_id, snapshot_id, number + 1)
            layer.hardlink_to(volume)
        held = self._layout.snapshot_layer(snapshot_id)
        if not is_same_file(held, volume):
            # That of an earlier attempt.
            held.unlink(missing_ok=True)
            held.hardlink_to(volume)
        return DiskFile(layer, "qcow2")

    async def end(self, sandbox_id: str, snapshot_id: str, *, switched: bool) -> None:
        """Go on with the new top or with the old one; see ``StorageDriver.end_layer``."""
        volume, next_top = self._layout.volume(sandbox_id), self._layout.next_top(sandbox_id, snapshot_id)
        _, layer = self._newest(sandbox_id, snapshot_id)
        if switched and next_top.exists():
            if layer is not None:
                layer.chmod(0o400)
            next_top.rename(volume)
            await asyncio.to_thread(sync_folder, self._layout.root)
            return
        if next_top.exists() and not is_empty_overlay(next_top):
            raise ConflictError(
                f"{next_top} is written to by the machine of sandbox {sandbox_id} and cannot go",
                code="layer_in_use",
                hint="end the layer as one that the machine was switched to",
            )
        next_top.with_name(f"{next_top.name}.new").unlink(missing_ok=True)
        next_top.unlink(missing_ok=True)
        for name in (self._layout.snapshot_layer(snapshot_id), layer):
            if name is not None and is_same_file(name, volume):
                name.unlink()

    def check_none_under_way(self, sandbox_id: str, *, but: Path | None = None) -> None:
        """Raises ConflictError (``layer_under_way``) between a ``begin`` and its ``end``."""
        for next_top in self.next_tops(sandbox_id):
            if next_top.suffix == ".next" and next_top != but:
                raise ConflictError(
                    f"the volume of sandbox {sandbox_id} is just being frozen for a snapshot",
                    code="layer_under_way",
                    hint="try again when that snapshot is taken",
                )

    def next_tops(self, sandbox_id: str) -> Iterator[Path]:
        """Overlays that are made or finished, and not the volume yet."""
        return self._layout.root.glob(f"{sandbox_id}-*.qcow2.next*")

    def _newest(self, sandbox_id: str, snapshot_id: str) -> tuple[int, Path | None]:
        """The layer of the last attempt, with its number; 0 if there was none."""
        number = 0
        while self._layout.layer(sandbox_id, snapshot_id, number + 1).exists():
            number += 1
        return number, self._layout.layer(sandbox_id, snapshot_id, number) if number else None


def is_same_file(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except FileNotFoundError:
        return False


def _synchronize(file: Path, *folders: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for folder in folders:
        sync_folder(folder)
