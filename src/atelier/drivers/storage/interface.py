"""Interface of the storage drivers: a sandbox's root volume, made from a read-only base in no time."""

from __future__ import annotations

from typing import Protocol

from atelier.model.machine import Disk, VolumeRequest


class StorageDriver(Protocol):
    """Makes and removes volumes. Raises DiskFullError when there is no room, HostError for the rest."""

    @property
    def name(self) -> str: ...

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        """A copy-on-write volume over ``request.base`` of ``size_mib``; an existing one is returned as it is.

        Raises InvalidRequestError when the size is below the base's.
        """
        ...

    async def find_volume(self, sandbox_id: str) -> Disk | None:
        """The sandbox's volume with its whole chain as it is on disk, whatever image is current; None if there is none.

        Raises HostError (``disk_file_damaged``) when it is not what this driver makes.
        """
        ...

    async def grow_volume(self, sandbox_id: str, size_mib: int) -> None:
        """Grow a volume that no VMM has open to ``size_mib``; nothing if it has that size.

        Raises InvalidRequestError (``disk_cannot_shrink``) for less than it has, NotFoundError (``volume_not_found``).
        """
        ...

    async def ensure_volume_absent(self, sandbox_id: str) -> None: ...

    async def list_volumes(self) -> list[str]:
        """Sandbox ids of the volumes of this installation that exist on disk."""
        ...

    async def used_bytes(self, sandbox_id: str) -> int:
        """Bytes that the volume really occupies; 0 if there is none."""
        ...

    async def free_bytes(self) -> int:
        """Bytes that new volumes can still take."""
        ...
