"""The steps that put a sandbox's memory on disk and take it back: what pausing and resuming have beside ``sandbox_steps``.

Used by ``sandbox_pause`` and ``sandbox_resume``. A memory fits the disk as it was when the machine stood still, and no
other: whoever lets the guest run on from it gives it up first (``spend``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from atelier.db.engine import Connection
from atelier.db.sandbox_machines import SandboxMachineRepository
from atelier.lifecycle.progress import ProgressEvents
from atelier.lifecycle.saga_values import boot_files_to_json, disk_to_json, restore_to_json
from atelier.lifecycle.sandbox_steps import SandboxSteps
from atelier.model.errors import ConflictError, HostError, VmmError
from atelier.model.machine import MachineStamp
from atelier.model.saved_machine import SavedMemory
from atelier.saga.definition import Step, StepContext
from atelier.saga.log import SagaRecord


@dataclass(frozen=True, slots=True)
class MemorySteps:
    steps: SandboxSteps
    machines: SandboxMachineRepository

    # --- to disk ------------------------------------------------------------------------------------------------------

    def quiesce(self) -> Step[Connection]:
        """The guest's processes and its root file system stand still."""
        return Step("quiesce", self._quiesce, self.steps.wake)

    def save(self) -> Step[Connection]:
        """The whole machine, as a file. It stands still afterwards."""
        return Step("memory", self._save, self._drop, self._commit_saved)

    def checksum(self) -> Step[Connection]:
        """So that a byte that the disk changes is found before it runs."""
        return Step("checksum", self._checksum, commit=self._commit_checksum)

    async def _quiesce(self, context: StepContext) -> dict[str, Any]:
        steps, directory = self.steps, self.steps.directory(context)
        if await steps.vmm.find_process(context.subject_id, directory) is None:
            raise VmmError("the virtual machine has ended", code="vmm_ended", hint="start the sandbox from its disk")
        # A manager that died in the middle of this has left it standing.
        await steps.vmm.go_on(directory)
        await steps.guests.quiesce(context.subject_id)
        return {}

    async def _save(self, context: StepContext) -> dict[str, Any]:
        steps = self.steps
        with steps.database.read() as connection:
            machine = self.machines.get_machine(connection, context.subject_id)
        await steps.memories.prepare(context.subject_id, machine.tools)
        stream = steps.memories.stream(context.subject_id)
        written = await steps.vmm.save(steps.directory(context), stream.path)
        saved = SavedMemory(machine, written.size_bytes, steps.vmm.boot_id())
        return {"saved": saved.to_json(), "stopped_ms": written.stopped_ms}

    async def _drop(self, context: StepContext) -> None:
        self.steps.memories.remove_stream(context.subject_id)

    def _commit_saved(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        self.machines.set_saved_memory(connection, record.subject_id, SavedMemory.from_json(output["saved"]))

    async def _checksum(self, context: StepContext) -> dict[str, Any]:
        return {"checksum": await self.steps.memories.checksum(context.subject_id)}

    def _commit_checksum(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        saved = self.machines.find_saved_memory(connection, record.subject_id)
        if saved is not None:
            changed = replace(saved, checksum=output["checksum"])
            self.machines.set_saved_memory(connection, record.subject_id, changed)

    # --- and back -----------------------------------------------------------------------------------------------------

    def find_saved(self) -> Step[Connection]:
        """The sandbox's own disk and its memory, which must fit what would run it."""
        return Step("image", self._find_saved, commit=self._commit_found)

    def spend(self) -> tuple[Step[Connection], ...]:
        """Give the memory up, now that it stands in the machine: from here on the disk changes. In the row first, so
        that no start resumes it once more."""
        return (
            Step("memory_spent", self._nothing, commit=self._commit_spent),
            Step("memory_removed", self._remove_stream, self._drop),
        )

    async def _find_saved(self, context: StepContext) -> dict[str, Any]:
        steps, sandbox = self.steps, self.steps.sandbox(context)
        with steps.database.read() as connection:
            saved = self.machines.find_saved_memory(connection, sandbox.id)
        if saved is None:
            return await self._find_spent(context)
        disk = await steps.own_disk(context)
        progress = ProgressEvents(steps.database, steps.outbox, sandbox.id)
        boot = await steps.images.ensure_boot_files(progress.report)
        await progress.finish()
        present = await steps.vmm.stamp(boot, steps.network.attachment_kind)
        check_stamp(saved.machine.stamp, present, sandbox.name)
        checked = await steps.memories.check(sandbox.id, saved, steps.vmm.boot_id())
        machine = saved.machine
        boot = replace(
            boot,
            tools=steps.memories.tools(sandbox.id),
            tools_id=machine.tools_id,
            kernel_release=machine.kernel_release,
        )
        return {
            "disk": disk_to_json(disk),
            "boot": boot_files_to_json(boot),
            "restore": restore_to_json(steps.memories.stream(sandbox.id)),
            "saved": checked.to_json(),
        }

    async def _find_spent(self, context: StepContext) -> dict[str, Any]:
        """A manager ended after the memory was given up: the machine goes on if it still runs."""
        found = context.outputs.get("image")
        identity = await self.steps.vmm.find_process(context.subject_id, self.steps.directory(context))
        if found is None or identity is None:
            raise HostError(
                "the memory was already given up when its machine ended",
                code="saved_memory_missing",
                hint="its disk is kept: start the sandbox from it",
            )
        return {**found, "adopted": True}

    def _commit_found(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        if self.machines.find_saved_memory(connection, record.subject_id) is not None:
            self.machines.set_saved_memory(connection, record.subject_id, SavedMemory.from_json(output["saved"]))

    async def _nothing(self, context: StepContext) -> dict[str, Any]:
        return {}

    async def _remove_stream(self, context: StepContext) -> dict[str, Any]:
        self.steps.memories.remove_stream(context.subject_id)
        return {}

    def _commit_spent(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        self.machines.set_saved_memory(connection, record.subject_id, None)


def check_stamp(saved: MachineStamp, present: MachineStamp, sandbox_name: str) -> None:
    """Raise ConflictError (``machine_mismatch``) naming the first field in which a saved machine does not fit this
    host's machines."""
    if difference := saved.difference(present):
        raise ConflictError(
            f"the saved memory of sandbox {sandbox_name} does not fit this host's machines any more: {difference}",
            code="machine_mismatch",
            hint=f"its disk is whole, its memory is given up then: atelier resume --from-disk {sandbox_name}",
        )
