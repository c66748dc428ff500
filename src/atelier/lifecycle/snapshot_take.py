"""The saga that saves a running sandbox as a snapshot: its memory by pre-copy, its disk by a switch to a new overlay.

Built by ``sandboxes``; the sandbox is its subject, so nothing else is done to it meanwhile. The guest stands still only
for the last moments and goes on at once; making memory and disk fit to be shared is left to ``snapshot_bake``, which is
written in the transaction that ends this one. A manager that dies in the middle takes it back: nothing half-made is kept.
Inputs: ``snapshot_id``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from atelier.db.engine import Connection
from atelier.db.sagas import delete_saga
from atelier.db.sandbox_machines import SandboxMachineRepository
from atelier.drivers.storage.interface import StorageDriver
from atelier.lifecycle.saga_ends import failure_of
from atelier.lifecycle.sandbox_steps import SandboxSteps
from atelier.lifecycle.snapshot_files import SnapshotFiles
from atelier.lifecycle.snapshot_rows import SnapshotRows
from atelier.lifecycle.transitions import Failure
from atelier.model.errors import ConflictError
from atelier.model.machine import ROOT_DISK_SERIAL, DiskFile
from atelier.model.snapshot import SnapshotState
from atelier.saga.definition import Recovery, SagaDefinition, Step, StepContext
from atelier.saga.log import SagaRecord

KIND = "snapshot_take"


def take_saga_id(sandbox_id: str) -> str:
    """One at a time: its record goes when it has ended."""
    return f"{KIND}/{sandbox_id}"


@dataclass(frozen=True, slots=True)
class TakeSteps:
    steps: SandboxSteps
    rows: SnapshotRows
    files: SnapshotFiles
    machines: SandboxMachineRepository

    @property
    def storage(self) -> StorageDriver:
        return self.steps.storage

    async def begin_layer(self, context: StepContext) -> dict[str, Any]:
        snapshot_id = context.inputs["snapshot_id"]
        top = await self.storage.begin_layer(context.subject_id, snapshot_id)
        return {"path": str(top.path)}

    async def settle_layer(self, context: StepContext) -> None:
        """Whichever disk the machine writes to by now is the sandbox's, and nothing is held for the snapshot."""
        directory = self.steps.directory(context)
        switched = True
        if await self.steps.vmm.find_process(context.subject_id, directory) is not None:
            try:
                # The one that was begun, if any was.
                top = await self.storage.begin_layer(context.subject_id, context.inputs["snapshot_id"])
            except ConflictError as error:
                if error.code != "disk_chain_too_long":
                    raise
                await self.storage.ensure_snapshot_disk_absent(context.inputs["snapshot_id"])
                return
            switched = await self.steps.vmm.writes_to(directory, ROOT_DISK_SERIAL, top)
        await self.storage.end_layer(context.subject_id, context.inputs["snapshot_id"], switched=switched)
        await self.storage.ensure_snapshot_disk_absent(context.inputs["snapshot_id"])

    async def save(self, context: StepContext) -> dict[str, Any]:
        snapshot_id = context.inputs["snapshot_id"]
        directory = self.steps.directory(context)
        top = await self.storage.begin_layer(context.subject_id, snapshot_id)
        with self.steps.database.read() as connection:
            machine = self.machines.get_machine(connection, context.subject_id)
        await self.files.prepare(snapshot_id, machine.tools)
        self.files.remove_stream(snapshot_id)

        async def quiesce() -> None:
            await self.steps.guests.quiesce(context.subject_id)

        async def thaw() -> None:
            await self.steps.guests.thaw(context.subject_id)

        top_file = DiskFile(top.path, top.format)
        async with self.steps.vmm.disk_switch(directory, ROOT_DISK_SERIAL, top_file) as switch_disk:

            async def freeze_disk() -> None:
                await switch_disk()
                await self.storage.freeze_layer(context.subject_id, snapshot_id)

            saved = await self.steps.vmm.save(
                directory,
                self.files.stream(snapshot_id).path,
                before_stop=quiesce,
                at_stop=freeze_disk,
                afterwards=thaw,
            )
        return {"stopped_ms": saved.stopped_ms}

    async def take_back(self, context: StepContext) -> None:
        await self.steps.wake(context)
        await self.files.remove(context.inputs["snapshot_id"])

    async def end_layer(self, context: StepContext) -> dict[str, Any]:
        await self.storage.end_layer(context.subject_id, context.inputs["snapshot_id"], switched=True)
        return {}


def define_take(take: TakeSteps, begin_bake: Callable[[Connection, str], None]) -> SagaDefinition[Connection]:
    """``begin_bake(connection, snapshot_id)`` writes the saga that goes on from here into the transaction."""

    def end_taken(connection: Connection, record: SagaRecord) -> None:
        snapshot_id = record.inputs["snapshot_id"]
        stopped_ms = record.outputs["memory"]["stopped_ms"]
        take.rows.move(connection, snapshot_id, SnapshotState.BAKING, stopped_ms=stopped_ms)
        begin_bake(connection, snapshot_id)
        delete_saga(connection, record.id)

    def end_unwound(connection: Connection, record: SagaRecord) -> None:
        failure = failure_of(record.failure)
        if record.unwind_requested:
            failure = Failure(
                "sandbox_destroyed",
                "its sandbox was destroyed while the snapshot was taken",
                "nothing of it is left; begin from an earlier snapshot, if there is one (atelier snapshots)",
            )
        take.rows.fail(connection, record.inputs["snapshot_id"], failure)
        delete_saga(connection, record.id)

    def say_stuck(connection: Connection, record: SagaRecord) -> None:
        take.rows.fail(connection, record.inputs["snapshot_id"], failure_of(record.error))

    return SagaDefinition(
        KIND,
        (
            Step("layer", take.begin_layer, take.settle_layer),
            Step("memory", take.save, take.take_back),
            Step("layer_kept", take.end_layer),
        ),
        recovery=Recovery.UNWIND,
        on_completed=end_taken,
        on_unwound=end_unwound,
        on_stuck=say_stuck,
    )
