"""Finds what bears this installation's name and has no row, and frees it: at the start and from a background loop.

Processes, sockets, run directories, slots and kept consoles are freed in DESIGN's order. **Volumes never**: an older
database may have been restored, and the newer one may come back; they stay where they are, are listed, and go only when
a person says so (``remove_volume``). What bears another name is never touched: drivers list their own installation's.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from atelier.db.engine import Database
from atelier.db.sandboxes import SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.consoles import KeptConsoles
from atelier.model.errors import AtelierError, ConflictError, NotFoundError
from atelier.model.layout import RunLayout

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OrphanVolume:
    """A volume without a sandbox. ``used_bytes``: what removing it would free."""

    sandbox_id: str
    used_bytes: int


class Reclaim:
    def __init__(
        self,
        *,
        database: Database,
        vmm: VmmDriver,
        storage: StorageDriver,
        network: NetworkDriver,
        guests: GuestDriver,
        run: RunLayout,
        consoles: KeptConsoles,
    ) -> None:
        self._database = database
        self._sandboxes = SandboxRepository()
        self._vmm = vmm
        self._storage = storage
        self._network = network
        self._guests = guests
        self._run = run
        self._consoles = consoles
        self._snapshots = SnapshotRepository()
        self._told: frozenset[str] = frozenset()

    async def free_orphans(self) -> list[str]:
        """Free all but volumes; returns the ids of sandboxes of which something was freed. What cannot be freed now is
        logged and left for the next time."""
        # Resources first, rows after: a row is written before its resources are made and goes after them, so what has
        # no row by then had an owner that is gone.
        machines = set(await self._vmm.list_sandboxes(self._run.sandboxes))
        channels = set(await self._guests.list_channels())
        slots = set(await self._network.list_slots())
        consoles = set(await self._consoles.list_sandboxes())
        known = self._known()
        freed: list[str] = []
        for sandbox_id in sorted((machines | channels | slots | consoles) - known):
            try:
                await self._free(sandbox_id)
            except AtelierError as error:
                _logger.error("what sandbox %s has left behind cannot be freed: %s", sandbox_id, error)
                continue
            _logger.warning("freed what sandbox %s had left behind", sandbox_id)
            freed.append(sandbox_id)
        await self._tell_of_volumes()
        return freed

    async def _free(self, sandbox_id: str) -> None:
        directory = self._run.vmm_directory(sandbox_id)
        await self._vmm.ensure_stopped(sandbox_id, directory, None)
        await self._guests.ensure_channel_absent(sandbox_id)
        await self._vmm.ensure_run_directory_absent(directory)
        await self._network.ensure_slot_absent(sandbox_id)
        await self._consoles.remove(sandbox_id)

    async def list_volumes(self) -> list[OrphanVolume]:
        """Volumes without a row, by id."""
        volumes = await self._storage.list_volumes()
        known = self._known()
        orphans = [sandbox_id for sandbox_id in volumes if sandbox_id not in known]
        used = await asyncio.gather(*(self._storage.used_bytes(sandbox_id) for sandbox_id in orphans))
        return [OrphanVolume(sandbox_id, count) for sandbox_id, count in zip(orphans, used, strict=True)]

    async def remove_volume(self, sandbox_id: str) -> None:
        """Remove a volume without a row, for good. Raises NotFoundError (``volume_not_found``), ConflictError
        (``volume_in_use``)."""
        if sandbox_id in self._known():
            raise ConflictError(
                f"the volume {sandbox_id} belongs to a sandbox",
                code="volume_in_use",
                hint=f"to remove both: atelier rm {sandbox_id}",
            )
        if sandbox_id not in await self._storage.list_volumes():
            raise NotFoundError(
                f"there is no volume {sandbox_id!r} without a sandbox",
                code="volume_not_found",
                hint="atelier doctor --reclaim shows the ones there are",
            )
        await self._storage.ensure_volume_absent(sandbox_id)

    async def _tell_of_volumes(self) -> None:
        orphans = await self.list_volumes()
        found = frozenset(orphan.sandbox_id for orphan in orphans)
        if found - self._told:
            mib = sum(orphan.used_bytes for orphan in orphans) // 2**20
            _logger.warning(
                "%d volumes (%d MiB) belong to no sandbox and are kept; atelier doctor --reclaim shows them",
                len(orphans),
                mib,
            )
        self._told = found

    def _known(self) -> set[str]:
        with self._database.read() as connection:
            return {*self._sandboxes.list_ids(connection), *self._snapshots.list_ids(connection)}
