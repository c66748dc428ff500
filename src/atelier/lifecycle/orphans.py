"""Volumes, memories of paused sandboxes and snapshots without a row: listed, told of, and removed when a person says so.

Used by ``reclaim``, which frees all else, and by the service of the host. **Nothing here goes by itself**: an older
database may have been restored, and the newer one may come back.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from atelier.db.engine import Database
from atelier.db.sandboxes import SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.drivers.storage.interface import StorageDriver
from atelier.lifecycle.saved_memories import SavedMemories
from atelier.lifecycle.snapshot_files import SnapshotFiles
from atelier.model.errors import ConflictError, NotFoundError
from atelier.model.orphan import Orphan, OrphanKind

_logger = logging.getLogger(__name__)

_OWNERS = {
    OrphanKind.VOLUME: ("sandbox", "atelier rm"),
    OrphanKind.MEMORY: ("sandbox", "atelier rm"),
    OrphanKind.SNAPSHOT: ("snapshot", "atelier snapshots rm"),
}
_PLURALS = {OrphanKind.VOLUME: "volumes", OrphanKind.MEMORY: "memories", OrphanKind.SNAPSHOT: "snapshots"}


class Orphans:
    def __init__(
        self, database: Database, storage: StorageDriver, memories: SavedMemories, snapshots: SnapshotFiles
    ) -> None:
        self._database = database
        self._storage = storage
        self._memories = memories
        self._snapshots = snapshots
        self._told: frozenset[tuple[OrphanKind, str]] = frozenset()

    async def list(self) -> list[Orphan]:
        """By kind and id."""
        used: dict[OrphanKind, Callable[[str], Awaitable[int]]] = {
            OrphanKind.VOLUME: self._storage.used_bytes,
            OrphanKind.MEMORY: self._memories.used_bytes,
            OrphanKind.SNAPSHOT: self._snapshot_bytes,
        }
        # Files first, rows after: a row is written before its files are made and goes after them.
        present = {kind: await self._list(kind) for kind in OrphanKind}
        known = self.known_ids()
        return [
            Orphan(kind, each, await used[kind](each))
            for kind in OrphanKind
            for each in present[kind]
            if each not in known
        ]

    async def remove(self, kind: OrphanKind, orphan_id: str) -> None:
        """For good. Raises NotFoundError (``orphan_not_found``), ConflictError (``not_an_orphan``)."""
        if orphan_id in self.known_ids():
            owner, command = _OWNERS[kind]
            raise ConflictError(
                f"the {kind} {orphan_id} belongs to a {owner}",
                code="not_an_orphan",
                hint=f"to remove both: {command} {orphan_id}",
            )
        if orphan_id not in await self._list(kind):
            owner, _ = _OWNERS[kind]
            raise NotFoundError(
                f"there is no {kind} {orphan_id!r} without a {owner}",
                code="orphan_not_found",
                hint="atelier doctor --reclaim shows what there is",
            )
        match kind:
            case OrphanKind.VOLUME:
                await self._storage.ensure_volume_absent(orphan_id)
            case OrphanKind.MEMORY:
                await self._memories.remove(orphan_id)
            case OrphanKind.SNAPSHOT:
                await self._storage.ensure_snapshot_disk_absent(orphan_id)
                await self._snapshots.remove(orphan_id)

    async def tell(self) -> None:
        """In the log, once of each."""
        orphans = await self.list()
        found = frozenset((orphan.kind, orphan.id) for orphan in orphans)
        if found - self._told:
            counts = [f"{sum(each.kind is kind for each in orphans)} {plural}" for kind, plural in _PLURALS.items()]
            mib = sum(orphan.used_bytes for orphan in orphans) // 2**20
            _logger.warning(
                "%s (%d MiB) belong to nobody and are kept; atelier doctor --reclaim shows them", ", ".join(counts), mib
            )
        self._told = found

    def known_ids(self) -> set[str]:
        """Of sandboxes and snapshots that have a row."""
        with self._database.read() as connection:
            return {*SandboxRepository().list_ids(connection), *SnapshotRepository().list_ids(connection)}

    async def _list(self, kind: OrphanKind) -> list[str]:
        match kind:
            case OrphanKind.VOLUME:
                return await self._storage.list_volumes()
            case OrphanKind.MEMORY:
                return self._memories.list()
            case OrphanKind.SNAPSHOT:
                return sorted({*await self._storage.list_snapshot_disks(), *self._snapshots.list()})

    async def _snapshot_bytes(self, snapshot_id: str) -> int:
        return await self._snapshots.used_bytes(snapshot_id) + await self._storage.snapshot_used_bytes(snapshot_id)
