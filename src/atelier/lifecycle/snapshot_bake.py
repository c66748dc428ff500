"""The saga that makes a snapshot of what was saved, and whose unwinding deletes it: there is no second list.

Built by ``sandboxes``; the snapshot is its subject. Its record stays in the log for as long as the snapshot lives: deleting
asks for its unwinding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from atelier.db.engine import Connection, Database
from atelier.db.sagas import delete_sagas_of
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.saga_ends import failure_of
from atelier.lifecycle.snapshot_files import SnapshotFiles
from atelier.lifecycle.snapshot_rows import SnapshotRows
from atelier.model.layout import RunLayout
from atelier.model.machine import TOOLS_DISK_SERIAL, BootFiles, Disk, DiskFile, MachineSpec, NetworkAttachment
from atelier.model.snapshot import Snapshot, SnapshotState
from atelier.saga.definition import Recovery, SagaDefinition, Step, StepContext
from atelier.saga.log import SagaRecord

KIND = "snapshot_bake"

_SOME_MAC = "02:00:00:00:00:01"


def bake_saga_id(snapshot_id: str) -> str:
    """A snapshot is baked once, so its saga's id needs no place of its own."""
    return f"{KIND}/{snapshot_id}"


@dataclass(frozen=True, slots=True)
class BakeSteps:
    rows: SnapshotRows
    files: SnapshotFiles
    storage: StorageDriver
    vmm: VmmDriver
    run: RunLayout
    installation_id: str
    database: Database

    async def make_disk(self, context: StepContext) -> dict[str, Any]:
        snapshot = self._snapshot(context)
        made = await self.storage.ensure_snapshot_disk(snapshot.id, snapshot.sandbox_id)
        return {"used_bytes": made.used_bytes}

    async def remove_disk(self, context: StepContext) -> None:
        await self.storage.ensure_snapshot_disk_absent(context.subject_id)

    async def remove_stream(self, context: StepContext) -> dict[str, Any]:
        self.files.remove_stream(context.subject_id)
        return {}

    async def remove_taken(self, context: StepContext) -> None:
        await self.storage.ensure_snapshot_disk_absent(context.subject_id)
        await self.files.remove(context.subject_id)

    async def nothing(self, context: StepContext) -> dict[str, Any]:
        return {}

    async def make_image(self, context: StepContext) -> dict[str, Any]:
        snapshot = self._snapshot(context)
        image = self.files.image(snapshot.id)
        if image.memory.exists() and image.state.exists():
            return {}
        disk = await self.storage.find_snapshot_disk(snapshot.id)
        assert disk is not None, "the step before has made it"
        tools = self.files.tools(snapshot.id)
        machine = snapshot.machine
        spec = MachineSpec(
            sandbox_id=snapshot.id,
            installation_id=self.installation_id,
            vcpu_count=snapshot.vcpu_count,
            memory_mib=snapshot.memory_mib,
            boot=BootFiles(tools, tools, tools, machine.kernel_release, machine.tools_id),
            root=disk,
            tools=Disk(TOOLS_DISK_SERIAL, DiskFile(tools, "raw"), read_only=True),
            network=NetworkAttachment(cast(Any, machine.stamp.network_kind), _SOME_MAC),
            run_directory=self.run.vmm_directory(snapshot.id),
        )
        await self.vmm.bake(self.files.stream(snapshot.id), machine.stamp, spec, image)
        return {}

    async def remove_image(self, context: StepContext) -> None:
        directory = self.run.vmm_directory(context.subject_id)
        await self.vmm.ensure_stopped(context.subject_id, directory, None)
        await self.vmm.ensure_run_directory_absent(directory)
        self.files.remove_image(context.subject_id)

    async def measure(self, context: StepContext) -> dict[str, Any]:
        return {
            "checksums": await self.files.checksums(context.subject_id),
            "memory_bytes": await self.files.memory_bytes(context.subject_id),
        }

    def _snapshot(self, context: StepContext) -> Snapshot:
        with self.database.read() as connection:
            return self.rows.repository.get(connection, context.subject_id)


def define_bake(bake: BakeSteps) -> SagaDefinition[Connection]:
    return define_making(
        bake,
        KIND,
        (
            # The folder and the frozen layer are from when the snapshot was taken; they go last.
            Step("files", bake.nothing, bake.remove_taken),
            Step("disk", bake.make_disk, bake.remove_disk),
            Step("image", bake.make_image, bake.remove_image),
            Step("checksums", bake.measure),
            Step("stream", bake.remove_stream),
        ),
    )


def define_making(bake: BakeSteps, kind: str, steps: tuple[Step[Connection], ...]) -> SagaDefinition[Connection]:
    """A saga under the id ``bake_saga_id`` that makes a snapshot ready; ``disk`` and ``checksums`` are among ``steps``."""

    def end_ready(connection: Connection, record: SagaRecord) -> None:
        disk, measured = record.outputs["disk"], record.outputs["checksums"]
        bake.rows.move(
            connection,
            record.subject_id,
            SnapshotState.READY,
            checksums=measured["checksums"],
            memory_bytes=measured["memory_bytes"],
            disk_bytes=disk["used_bytes"],
            boot_id=bake.vmm.boot_id(),
        )

    def end_unwound(connection: Connection, record: SagaRecord) -> None:
        if record.unwind_requested:
            bake.rows.end(connection, record.subject_id)
            delete_sagas_of(connection, record.subject_id)
        else:
            bake.rows.fail(connection, record.subject_id, failure_of(record.failure))

    def say_stuck(connection: Connection, record: SagaRecord) -> None:
        state = SnapshotState.DELETING if record.unwind_requested else SnapshotState.FAILED
        bake.rows.fail(connection, record.subject_id, failure_of(record.error), state)

    return SagaDefinition(
        kind,
        steps,
        recovery=Recovery.RESUME,
        on_completed=end_ready,
        on_unwound=end_unwound,
        on_stuck=say_stuck,
    )
