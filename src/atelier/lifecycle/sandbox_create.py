"""The saga that creates a sandbox, and whose unwinding destroys it: there is no second list.

Built by ``sandboxes``. Each step acquires one resource under a name derived from the installation and the sandbox's id;
the order is DESIGN's, from the network slot up to the VMM process, so that unwinding kills the VMM first and frees the
network last. A test pins it. Steps call drivers; the hooks at the end run inside the log's transactions and call none.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from atelier.db.engine import Connection, Database
from atelier.db.outbox import Outbox
from atelier.db.sagas import delete_sagas_of
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.boot_gate import BootGate
from atelier.lifecycle.consoles import KeptConsoles
from atelier.lifecycle.errors import describe_error
from atelier.lifecycle.progress import ProgressEvents
from atelier.lifecycle.saga_values import (
    boot_files_from_json,
    boot_files_to_json,
    disk_from_json,
    disk_to_json,
    network_from_json,
    network_to_json,
    process_from_json,
    process_to_json,
)
from atelier.lifecycle.transitions import Failure, Transitions
from atelier.model.errors import GuestError, GuestUnreachableError, NotFoundError, TimeoutExceededError, VmmError
from atelier.model.guest import GuestIdentity, ProcessEnded, ProcessOutput, ProcessSpec
from atelier.model.layout import RunLayout
from atelier.model.machine import TOOLS_DISK_SERIAL, Disk, DiskFile, MachineSpec, ProcessIdentity, VolumeRequest
from atelier.model.sandbox import Sandbox
from atelier.model.states import SandboxState
from atelier.saga.definition import Recovery, SagaDefinition, SagaInterruptedError, Step, StepContext
from atelier.saga.log import SagaRecord

KIND = "sandbox_create"
WARNING = "sandbox.warning"

_ENTROPY_BYTES = 64
_GROWTH_SECONDS = 300.0
_GROWTH_OUTPUT_BYTES = 4096
_PROGRAM_NOT_FOUND = 127

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def create_saga_id(sandbox_id: str) -> str:
    """A sandbox is created once, so its saga's id needs no place of its own."""
    return f"{KIND}/{sandbox_id}"


@dataclass(frozen=True, slots=True)
class SandboxCreation:
    """The steps and hooks of the saga, with what they need. ``guest_ready_seconds`` runs from the VMM's start to the
    guest agent's first answer."""

    database: Database
    sandboxes: SandboxRepository
    outbox: Outbox
    transitions: Transitions
    vmm: VmmDriver
    storage: StorageDriver
    network: NetworkDriver
    images: ImageDriver
    guests: GuestDriver
    run: RunLayout
    consoles: KeptConsoles
    gate: BootGate
    installation_id: str
    guest_ready_seconds: float

    def definition(self) -> SagaDefinition[Connection]:
        return SagaDefinition(
            KIND,
            (
                Step("image", self._find_image, commit=self._commit_image),
                Step("network", self._take_slot, self._free_slot),
                Step("volume", self._make_volume, self._remove_volume),
                Step("run_directory", self._make_run_directory, self._remove_run_directory),
                Step("guest_channel", self._attach_channel, self._detach_channel),
                Step("vmm", self._start_vmm, self._stop_vmm, commit=self._commit_vmm),
                Step("guest_ready", self._wait_for_guest),
                Step("guest_identity", self._give_identity),
                Step("file_system", self._grow_file_system, commit=self._commit_growth),
            ),
            recovery=Recovery.UNWIND,
            on_failure=self._describe_failure,
            on_completed=self._end_running,
            on_unwound=self._end_unwound,
            on_stuck=self._say_stuck,
        )

    # --- steps ------------------------------------------------------------------------------------------------------

    async def _find_image(self, context: StepContext) -> dict[str, Any]:
        """Images and boot files are shared and cached by content: nothing to undo."""
        sandbox = self._sandbox(context)
        progress = ProgressEvents(self.database, self.outbox, sandbox.id)
        boot = await self.images.ensure_boot_files(progress.report)
        image = await self.images.ensure_image(sandbox.spec.image, progress.report)
        await progress.finish()
        return {
            "image_id": image.id,
            "path": str(image.path),
            "size_mib": image.size_mib,
            "boot": boot_files_to_json(boot),
        }

    def _commit_image(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        self.sandboxes.set_image_id(connection, record.subject_id, output["image_id"])

    async def _take_slot(self, context: StepContext) -> dict[str, Any]:
        return network_to_json(await self.network.ensure_slot(context.subject_id))

    async def _free_slot(self, context: StepContext) -> None:
        await self.network.ensure_slot_absent(context.subject_id)

    async def _make_volume(self, context: StepContext) -> dict[str, Any]:
        sandbox = self._sandbox(context)
        base = DiskFile(Path(context.outputs["image"]["path"]), "raw")
        return disk_to_json(await self.storage.ensure_volume(VolumeRequest(sandbox.id, base, sandbox.spec.disk_mib)))

    async def _remove_volume(self, context: StepContext) -> None:
        await self.storage.ensure_volume_absent(context.subject_id)

    async def _make_run_directory(self, context: StepContext) -> dict[str, Any]:
        await self.vmm.ensure_run_directory(context.subject_id, self._directory(context))
        return {}

    async def _remove_run_directory(self, context: StepContext) -> None:
        """The console lies in it. Its kept copy tells why a creation failed, until the sandbox itself goes."""
        await self.vmm.ensure_run_directory_absent(self._directory(context))
        if context.unwind_requested:
            await self.consoles.remove(context.subject_id)

    async def _attach_channel(self, context: StepContext) -> dict[str, Any]:
        """Before the VMM starts: the other end is then connected as soon as there is one."""
        with self.database.read() as connection:
            token = self.sandboxes.get_secrets(connection, context.subject_id).token
        await self.guests.ensure_channel(context.subject_id, self.vmm.guest_endpoint(self._directory(context)), token)
        return {}

    async def _detach_channel(self, context: StepContext) -> None:
        await self.guests.ensure_channel_absent(context.subject_id)

    async def _start_vmm(self, context: StepContext) -> dict[str, Any]:
        sandbox = self._sandbox(context)
        boot = boot_files_from_json(context.outputs["image"]["boot"])
        spec = MachineSpec(
            sandbox_id=sandbox.id,
            installation_id=self.installation_id,
            vcpu_count=sandbox.spec.vcpu_count,
            memory_mib=sandbox.spec.memory_mib,
            boot=boot,
            root=disk_from_json(context.outputs["volume"]),
            tools=Disk(TOOLS_DISK_SERIAL, DiskFile(boot.tools, "raw"), read_only=True),
            network=network_from_json(context.outputs["network"]),
            run_directory=self._directory(context),
        )
        await self.gate.enter(sandbox.id)
        return process_to_json(await self.vmm.ensure_started(spec))

    async def _stop_vmm(self, context: StepContext) -> None:
        self.gate.leave(context.subject_id)
        await self.vmm.ensure_stopped(context.subject_id, self._directory(context), _process(context))

    def _commit_vmm(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        self.sandboxes.set_vmm_process(connection, record.subject_id, process_from_json(output))

    async def _wait_for_guest(self, context: StepContext) -> dict[str, Any]:
        try:
            await self._while_machine_runs(
                context, self.guests.wait_ready(context.subject_id, self.guest_ready_seconds)
            )
        except TimeoutExceededError as error:
            # Not worth another try: the limit is generous, and the guest had all of it.
            raise GuestError(
                f"the guest did not answer within {self.guest_ready_seconds:g} s of its machine's start",
                code="guest_not_ready",
                hint="the end of its console says how far it came",
            ) from error
        finally:
            self.gate.leave(context.subject_id)
        return {}

    async def _give_identity(self, context: StepContext) -> dict[str, Any]:
        with self.database.read() as connection:
            sandbox = self.sandboxes.get(connection, context.subject_id)
            kept = self.sandboxes.get_secrets(connection, context.subject_id)
        identity = GuestIdentity(
            hostname=sandbox.name,
            machine_id=kept.machine_id,
            token=kept.token,
            entropy=secrets.token_bytes(_ENTROPY_BYTES),
            host_time_ns=time.time_ns(),
            environment=sandbox.spec.environment,
        )
        await self._while_machine_runs(context, self.guests.initialize(sandbox.id, identity))
        return {}

    async def _grow_file_system(self, context: StepContext) -> dict[str, Any]:
        sandbox = self._sandbox(context)
        if sandbox.spec.disk_mib <= context.outputs["image"]["size_mib"]:
            return {}
        warning = await self._while_machine_runs(context, self._run_resize(sandbox.id))
        return {"warning": warning} if warning else {}

    async def _run_resize(self, sandbox_id: str) -> str:
        """Grow the root file system to its disk, online. Returns a warning where the image cannot; raises GuestError
        when it should have worked."""
        spec = ProcessSpec(("resize2fs", "/dev/vda"), user="root", timeout_seconds=_GROWTH_SECONDS)
        without = "the image has no resize2fs: the file system keeps the image's size, not the disk's"
        output = bytearray()
        try:
            async with self.guests.start_process(sandbox_id, spec) as events:
                async for event in events:
                    if isinstance(event, ProcessOutput):
                        output += event.data
                        del output[:-_GROWTH_OUTPUT_BYTES]
                    elif isinstance(event, ProcessEnded):
                        if event.exit_code == 0:
                            return ""
                        if event.exit_code == _PROGRAM_NOT_FOUND:
                            return without
                        said = output.decode("utf-8", "replace").strip()
                        raise GuestError(
                            f"the file system could not be grown: resize2fs: {event.error or event.status}: {said}",
                            code="file_system_not_grown",
                            hint="look at the console's end for errors of the disk",
                        )
        except NotFoundError:
            return without
        raise GuestUnreachableError(f"the guest of {sandbox_id} went silent while its file system was grown")

    def _commit_growth(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        if message := output.get("warning"):
            self.outbox.append(connection, WARNING, record.subject_id, {"message": message})

    async def _while_machine_runs(self, context: StepContext, work: Coroutine[Any, Any, _T]) -> _T:
        """What ``work`` returns; or VmmError at once when the machine ends meanwhile."""
        identity = _process(context)
        assert identity is not None
        working = asyncio.create_task(work)
        ending = asyncio.create_task(self.vmm.wait_ended(identity))
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            ending.result()
            raise VmmError(
                "the virtual machine ended before its guest was ready",
                code="vmm_ended",
                hint="the end of its console says how far the guest came",
            )
        finally:
            working.cancel()
            ending.cancel()
            await asyncio.gather(working, ending, return_exceptions=True)

    # --- hooks: inside the log's transactions -------------------------------------------------------------------------

    async def _describe_failure(self, context: StepContext, error: Exception) -> dict[str, Any]:
        """Not inside a transaction: everything that was acquired still stands, the console's file too."""
        if isinstance(error, SagaInterruptedError):
            words = {
                "code": "interrupted",
                "message": "the manager ended while the sandbox was being created",
                "hint": "create it again",
            }
        else:
            words = describe_error(error)
        return {**words, "console_tail": await self.consoles.keep(context.subject_id)}

    def _end_running(self, connection: Connection, record: SagaRecord) -> None:
        self.transitions.apply(connection, record.subject_id, SandboxState.RUNNING)

    def _end_unwound(self, connection: Connection, record: SagaRecord) -> None:
        if record.unwind_requested:
            self.transitions.end(connection, record.subject_id)
            delete_sagas_of(connection, record.subject_id)
            return
        self.sandboxes.set_holds_volume(connection, record.subject_id, False)
        self.sandboxes.set_vmm_process(connection, record.subject_id, None)
        self._fail(connection, record.subject_id, _failure(record.failure))

    def _say_stuck(self, connection: Connection, record: SagaRecord) -> None:
        hint = f"remove what is in the way, then: atelier rm {record.subject_id}"
        reason = record.error.get("message", "")
        if record.unwind_requested:
            message = f"the sandbox cannot be removed: {reason}"
            self.transitions.mark_stuck(connection, record.subject_id, Failure("destroy_stuck", message, hint))
            return
        failure = _failure(record.failure)
        message = f"{failure.message}; and cleaning up is stuck: {reason}"
        stuck = Failure("create_stuck", message, hint, failure.console_tail)
        self._fail(connection, record.subject_id, stuck)
        self.transitions.mark_stuck(connection, record.subject_id, stuck)

    def _fail(self, connection: Connection, sandbox_id: str, failure: Failure) -> None:
        """To ``failed``, or new words for one that is there already: its cleaning up was stuck before."""
        if self.sandboxes.get(connection, sandbox_id).state is SandboxState.FAILED:
            self.transitions.restate(connection, sandbox_id, failure)
        else:
            self.transitions.apply(connection, sandbox_id, SandboxState.FAILED, failure)

    # --- what steps share ---------------------------------------------------------------------------------------------

    def _sandbox(self, context: StepContext) -> Sandbox:
        with self.database.read() as connection:
            return self.sandboxes.get(connection, context.subject_id)

    def _directory(self, context: StepContext) -> Path:
        return self.run.vmm_directory(context.subject_id)


def _process(context: StepContext) -> ProcessIdentity | None:
    output = context.outputs.get("vmm")
    return None if output is None else process_from_json(output)


def _failure(described: dict[str, Any]) -> Failure:
    return Failure(
        code=described.get("code", "internal"),
        message=described.get("message", "the reason is not known"),
        hint=described.get("hint", ""),
        console_tail=described.get("console_tail", ""),
    )
