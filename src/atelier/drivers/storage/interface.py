"""Interface of the storage drivers: a sandbox's root volume, made from a read-only base in no time, and its snapshots.

A *layer* is the present top of a sandbox's volume, frozen for one snapshot: ``begin_layer``, the VMM is switched to the
disk that it returns, ``freeze_layer``, ``end_layer``. In the background the layer becomes the *snapshot disk*, over which volumes are made
as over an image's. One operation at a time works on a sandbox's volume, and on a snapshot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from atelier.model.machine import Disk, DiskFile, SnapshotDisk, VolumeRequest


class StorageDriver(Protocol):
    """Makes and removes volumes. Raises DiskFullError when there is no room, HostError for the rest."""

    @property
    def name(self) -> str: ...

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        """A copy-on-write volume over ``request.base`` of ``size_mib``; an existing one is returned as it is. The base may
        be deleted, with its image or its snapshot, from then on.

        Raises InvalidRequestError when the size is below the base's.
        """
        ...

    async def find_volume(self, sandbox_id: str) -> Disk | None:
        """The sandbox's volume with its whole chain as it is on disk, whatever image is current; None if there is none.

        Raises HostError (``disk_file_damaged``) when it is not what this driver makes.
        """
        ...

    @property
    def grows_open_volumes(self) -> bool:
        """Whether a volume grows while a VMM has it open, and must before that looks at its size. Else it is the VMM that
        grows what it has open."""
        ...

    async def grow_volume(self, sandbox_id: str, size_mib: int) -> None:
        """Grow a volume, which no VMM has open unless ``grows_open_volumes``, to ``size_mib``; nothing if it has that size.

        Raises InvalidRequestError (``disk_cannot_shrink``) for less than it has, NotFoundError (``volume_not_found``),
        ConflictError (``layer_under_way``).
        """
        ...

    async def shorten_volume(self, sandbox_id: str) -> None:
        """Make one file of all that only this sandbox's volume consists of; no VMM has it open. A volume has one more
        file after each layer and must not have more than eight (``len(disk.backing) + 1``).

        May copy the whole volume. Raises NotFoundError (``volume_not_found``), ConflictError (``layer_under_way``).
        """
        ...

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        """Also in the middle of freezing. What snapshots need of it stays."""
        ...

    async def list_volumes(self) -> list[str]:
        """Sandbox ids of the volumes of this installation that exist on disk."""
        ...

    async def used_bytes(self, sandbox_id: str) -> int:
        """Bytes that the volume really occupies, its layers included and the snapshot that it was made from excluded,
        unless that is deleted and nobody else has it; 0 if there is none."""
        ...

    async def free_bytes(self) -> int:
        """Bytes that new volumes can still take."""
        ...

    async def begin_layer(self, sandbox_id: str, snapshot_id: str) -> DiskFile:
        """Prepare to freeze the volume: the file that the VMM is to be switched to, which is an empty overlay over the
        volume, or, where a volume is frozen without that, the volume as it is.

        The volume is used as before until the VMM is switched. Called again it returns the same file; after an ``end``
        it begins another attempt for the same snapshot, whose layer is the one that counts. Raises NotFoundError
        (``volume_not_found``), ConflictError (``layer_under_way`` for another snapshot, ``disk_chain_too_long``,
        ``snapshot_exists``: it has its disk already).
        """
        ...

    async def freeze_layer(self, sandbox_id: str, snapshot_id: str) -> None:
        """Awaited between ``begin_layer`` and ``end_layer`` while the machine stands still, after it was switched: from
        here on what the guest writes is not the snapshot's. Twice is once. Raises DiskFullError, HostError."""
        ...

    async def end_layer(self, sandbox_id: str, snapshot_id: str, *, switched: bool) -> None:
        """``switched``: the new file is the volume now, and what was the volume is the snapshot's layer. Otherwise all is
        as before ``begin_layer``.

        Nothing where no layer of this snapshot was begun, or it was ended. Where no VMM lives ``switched=True`` is always
        right: the new file is empty then, or holds what the guest wrote last. Raises ConflictError (``layer_in_use``) when
        something was written to a file that was not switched to.
        """
        ...

    async def ensure_snapshot_disk(self, snapshot_id: str, sandbox_id: str) -> SnapshotDisk:
        """Copy the snapshot's layer, with what the sandbox has below it, into a disk of its own. The sandbox may run on, or
        be destroyed already. Whole or absent, after a crash and with a full disk too.

        Raises NotFoundError (``layer_not_found``), ConflictError (``layer_under_way``), DiskFullError.
        """
        ...

    async def find_snapshot_disk(self, snapshot_id: str) -> Disk | None:
        """The snapshot's disk, read-only, with its whole chain; None if it was not made yet.

        Raises HostError (``disk_file_damaged``, ``disk_file_missing``).
        """
        ...

    async def verify_snapshot_disk(self, snapshot_id: str) -> None:
        """Read the whole file and compare it with its checksum.

        Raises NotFoundError (``snapshot_disk_not_found``), HostError (``disk_file_damaged``).
        """
        ...

    async def export_snapshot_disk(self, snapshot_id: str, target: Path) -> str:
        """Have the file of the snapshot's disk as ``target`` too, read-only and on disk; its checksum. It is for
        ``import_snapshot_disk``, of another installation as well, and nothing else can be done with it.

        Raises NotFoundError (``snapshot_disk_not_found``), ConflictError (``snapshot_disk_not_alone``: it stands over
        another snapshot's), DiskFullError.
        """
        ...

    async def import_snapshot_disk(self, snapshot_id: str, source: Path, base: DiskFile, checksum: str) -> SnapshotDisk:
        """A disk like the exported one over ``base``, the image that that one stood over. Whole or absent; one that is
        there is returned as it is.

        Raises HostError (``disk_file_missing``, ``disk_file_damaged``: not what was exported), DiskFullError.
        """
        ...

    async def ensure_snapshot_disk_absent(self, snapshot_id: str) -> None:
        """Remove the disk, and the hold on a layer of which none was made. Volumes and other snapshots' disks that stand
        over it keep what they need, and its room is free when they are gone."""
        ...

    async def snapshot_used_bytes(self, snapshot_id: str) -> int:
        """Bytes that the snapshot's disk really occupies, whatever stands over it; 0 if it was not made."""
        ...

    async def list_snapshot_disks(self) -> list[str]:
        """Ids of snapshots that have a disk on this host, or hold a layer to make one of."""
        ...
