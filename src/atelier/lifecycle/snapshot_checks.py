"""Whether a snapshot can be used: complete, whole, and fit for this host's machines.

Used by the steps of creates and by a background loop. A damaged one is taken out of service; its siblings stay usable.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, replace

from atelier.db.engine import Connection, Database
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.snapshot_files import MEMORY, STATE, SnapshotFiles
from atelier.lifecycle.snapshot_rows import SnapshotRows
from atelier.lifecycle.transitions import Failure
from atelier.model.errors import ConflictError, HostError, NotFoundError
from atelier.model.machine import BootFiles
from atelier.model.snapshot import Snapshot, SnapshotState

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SnapshotChecks:
    database: Database
    rows: SnapshotRows
    files: SnapshotFiles
    storage: StorageDriver
    vmm: VmmDriver
    network: NetworkDriver

    async def check_usable(self, snapshot: Snapshot, boot: BootFiles) -> None:
        """That a machine can be restored from it here and now; ``boot`` is what this host would boot.

        Raises ConflictError (``snapshot_not_ready``, ``snapshot_incompatible``: it names the field), HostError
        (``snapshot_damaged``), NotFoundError (``snapshot_disk_not_found``), after which it is out of service.
        """
        await self.check_fits(snapshot, boot)
        await self.check_whole(snapshot)

    async def check_fits(self, snapshot: Snapshot, boot: BootFiles) -> None:
        """That this host's machines are like the one that was saved; ``boot`` is what it would boot.

        Raises ConflictError (``snapshot_not_ready``, ``snapshot_incompatible``: it names the field).
        """
        require_ready(snapshot)
        present = await self.vmm.stamp(boot, self.network.attachment_kind)
        if difference := snapshot.machine.stamp.difference(present):
            raise ConflictError(
                f"the snapshot {snapshot.name} does not fit this host's machines: {difference}",
                code="snapshot_incompatible",
                hint=f"begin from its disk alone, which boots: atelier create --snapshot {snapshot.name} --disk-only",
            )

    async def check_whole(self, snapshot: Snapshot) -> None:
        """That its files are what was written; the large ones are read where the host was booted since that was known.

        Raises ConflictError (``snapshot_not_ready``), HostError (``snapshot_damaged``, ``disk_file_damaged``),
        NotFoundError (``snapshot_disk_not_found``), after which it is out of service.
        """
        require_ready(snapshot)
        await self._check(snapshot, thoroughly=snapshot.boot_id != self.vmm.boot_id())

    async def check_next(self) -> None:
        """Read one snapshot through, large files included, of those that were not since the host was booted. The body of
        a background loop, which reads them all little by little."""
        boot_id = self.vmm.boot_id()
        with self.database.read() as connection:
            ready = self.rows.repository.list_in(connection, [SnapshotState.READY])
        snapshot = next((each for each in ready if each.boot_id != boot_id), None)
        if snapshot is not None:
            # Then it is out of service, and the log says so.
            with suppress(HostError, NotFoundError):
                await self._check(snapshot, thoroughly=True)

    async def _check(self, snapshot: Snapshot, *, thoroughly: bool) -> None:
        try:
            if not thoroughly:
                await self.files.check(snapshot.id, snapshot.checksums, STATE)
                return
            await self.files.check(snapshot.id, snapshot.checksums, STATE, MEMORY)
            await self.storage.verify_snapshot_disk(snapshot.id)
        except (HostError, NotFoundError) as error:
            failure = Failure("snapshot_damaged", error.message, error.hint)

            def quarantine(connection: Connection) -> None:
                present = self.rows.repository.find(connection, snapshot.id)
                if present is not None and present.state is SnapshotState.READY:
                    _logger.error("the snapshot %s is out of service: %s", present.name, failure.message)
                    self.rows.fail(connection, snapshot.id, failure, SnapshotState.DAMAGED)

            await self.database.write(quarantine)
            raise

        def note(connection: Connection) -> None:
            present = self.rows.repository.find(connection, snapshot.id)
            if present is not None and present.state is SnapshotState.READY:
                self.rows.repository.update(connection, replace(present, boot_id=self.vmm.boot_id()))

        await self.database.write(note)


_NOT_READY_HINTS = {
    SnapshotState.TAKING: "wait until it is ready: atelier snapshots get {name}",
    SnapshotState.BAKING: "wait until it is ready: atelier snapshots get {name}",
    SnapshotState.DELETING: "choose another (atelier snapshots), or take a new one",
    SnapshotState.FAILED: "nothing of it is left; atelier snapshots get {name} says why; take it anew",
    SnapshotState.DAMAGED: "it serves nobody any more; choose another (atelier snapshots), or take a new one",
}


def require_ready(snapshot: Snapshot) -> None:
    """Raises ConflictError (``snapshot_not_ready``)."""
    if snapshot.state is not SnapshotState.READY:
        raise ConflictError(
            f"the snapshot {snapshot.name} is {snapshot.state}",
            code="snapshot_not_ready",
            hint=_NOT_READY_HINTS[snapshot.state].format(name=snapshot.name),
        )
