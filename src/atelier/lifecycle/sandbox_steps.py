"""The steps of which a sandbox's sagas are made: each ensures that one resource is present, or absent.

Used by the modules that define these sagas; ``memory_steps`` has those of pausing and resuming. Each resource bears a name derived
from the installation and the sandbox's id, so a step finds what an earlier run, or an earlier saga, has left. Steps call
drivers; what they hand to the log's transactions calls none.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from atelier.db.engine import Connection, Database
from atelier.db.outbox import Outbox
from atelier.db.sandbox_machines import SandboxMachineRepository
from atelier.db.sandbox_networks import SandboxNetworkRepository
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.boot_gate import BootGate
from atelier.lifecycle.connected_start import start_connected
from atelier.lifecycle.consoles import KeptConsoles
from atelier.lifecycle.disk_growth import grow_disk, grow_root_file_system
from atelier.lifecycle.network_policies import NetworkPolicies
from atelier.lifecycle.origins import Origins
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
    restore_from_json,
)
from atelier.lifecycle.saved_memories import SavedMemories
from atelier.lifecycle.ssh_host_key import make_ssh_host_key
from atelier.lifecycle.transitions import Transitions
from atelier.model.errors import (
    AtelierError,
    ConflictError,
    GuestError,
    GuestUnreachableError,
    HostError,
    TimeoutExceededError,
    VmmError,
)
from atelier.model.guest import GuestIdentity
from atelier.model.layout import RunLayout
from atelier.model.machine import (
    TOOLS_DISK_SERIAL,
    Disk,
    DiskFile,
    MachineSpec,
    ProcessIdentity,
    VolumeRequest,
)
from atelier.model.sandbox import Sandbox
from atelier.model.saved_machine import MachineRecord
from atelier.model.states import SandboxState
from atelier.saga.definition import Step, StepContext
from atelier.saga.log import SagaRecord

WARNING = "sandbox.warning"

_ENTROPY_BYTES = 64
_MANY_FILES_BELOW = 4
"""Eight files are as many as a disk may consist of."""

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")
Steps = tuple[Step[Connection], ...]


@dataclass(frozen=True, slots=True)
class SandboxSteps:
    """The steps, with what they need. ``guest_ready_seconds`` runs from the VMM's start to the guest agent's first
    answer."""

    database: Database
    sandboxes: SandboxRepository
    outbox: Outbox
    transitions: Transitions
    vmm: VmmDriver
    storage: StorageDriver
    network: NetworkDriver
    network_policies: NetworkPolicies
    images: ImageDriver
    guests: GuestDriver
    run: RunLayout
    consoles: KeptConsoles
    memories: SavedMemories
    origins: Origins
    gate: BootGate
    installation_id: str
    guest_ready_seconds: float
    stop_grace_seconds: float

    def acquiring(
        self, *, find: Step[Connection], keeps_disk: bool, spend_memory: Steps = (), prepare: Steps = ()
    ) -> Steps:
        """All that a running sandbox consists of, in the order in which it is acquired: DESIGN's, from the network slot
        up to the VMM process, so that unwinding kills the VMM first and frees the network last. ``keeps_disk``: slot
        and volume stay when it is unwound, unless the saga itself was to make them (input ``fresh``).

        ``spend_memory`` gives up the memory of a paused sandbox that its machine was restored from, once it stands in
        the machine. ``prepare`` is done in the guest once it goes."""
        free_slot, remove_volume = self._free_slot, self._remove_volume
        if keeps_disk:
            free_slot, remove_volume = _only_if_fresh(free_slot), _only_if_fresh(remove_volume)
        return (
            find,
            Step("network", self._take_slot, free_slot, self._commit_slot),
            Step("volume", self._make_volume, remove_volume, self._commit_volume),
            Step("run_directory", self._make_run_directory, self._remove_run_directory),
            Step("guest_channel", self._attach_channel, self._detach_channel),
            Step("vmm", self._start_vmm, self._stop_vmm, self._commit_vmm),
            Step("guest_ready", self._wait_for_guest),
            *spend_memory,
            Step("guest_identity", self._give_identity),
            Step("guest_thaw", self._thaw_guest),
            *prepare,
            Step("file_system", self._grow_file_system, commit=self._commit_growth),
        )

    def releasing(self) -> Steps:
        """What a stopped sandbox does not hold: the same undos, as steps that go forward only."""
        return (
            Step("vmm", _as_step(self._stop_vmm)),
            Step("guest_channel", _as_step(self._detach_channel)),
            Step("run_directory", _as_step(self._remove_run_directory)),
        )

    def find_image(self) -> Step[Connection]:
        """Images and boot files are shared and cached by content: nothing to undo."""
        return Step("image", self._find_image, commit=self._commit_image)

    def find_disk(self) -> Step[Connection]:
        """The sandbox's own disk, whatever its image is by now; or, where it has none (its creation failed), the image
        to make one from."""
        return Step("image", self._find_disk, commit=self._commit_image)

    def shut_guest_down(self) -> Step[Connection]:
        """The guest writes everything to its disk and ends. It cannot be undone."""
        return Step("guest_shutdown", self._shut_guest_down)

    def grow_disk(self) -> Steps:
        """The disk, and in a running guest the file system on it, to the row's ``disk_mib``."""
        return (
            Step("disk", self._grow_disk),
            Step("file_system", self._grow_running_file_system, commit=self._commit_growth),
        )

    # --- before there is anything -------------------------------------------------------------------------------------

    async def _find_image(self, context: StepContext) -> dict[str, Any]:
        sandbox = self.sandbox(context)
        progress = ProgressEvents(self.database, self.outbox, sandbox.id)
        found = await self.origins.find(sandbox, progress.report)
        await progress.finish()
        return found

    def _commit_image(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        if image_id := output.get("image_id"):
            self.sandboxes.set_image_id(connection, record.subject_id, image_id)

    async def _find_disk(self, context: StepContext) -> dict[str, Any]:
        sandbox = self.sandbox(context)
        if context.inputs.get("fresh") and await self.storage.find_volume(sandbox.id) is None:
            return await self._find_image(context)
        disk = await self.own_disk(context)
        progress = ProgressEvents(self.database, self.outbox, sandbox.id)
        boot = await self.images.ensure_boot_files(progress.report)
        await progress.finish()
        return {"disk": disk_to_json(disk), "boot": boot_files_to_json(boot)}

    async def own_disk(self, context: StepContext) -> Disk:
        """As it is, but made of few files while nobody has it open: each snapshot has added one.

        Raises HostError (``volume_lost``).
        """
        sandbox_id = context.subject_id
        disk = await self.storage.find_volume(sandbox_id)
        if disk is not None and len(disk.backing) >= _MANY_FILES_BELOW:
            if await self.vmm.find_process(sandbox_id, self.directory(context)) is None:
                await self.storage.shorten_volume(sandbox_id)
            disk = await self.storage.find_volume(sandbox_id)
        if disk is None:
            name = self.sandbox(context).name
            raise HostError(
                f"the disk of sandbox {name} is gone",
                code="volume_lost",
                hint=f"put its file back, or let go of the sandbox: atelier rm {name}",
            )
        return disk

    # --- resources ----------------------------------------------------------------------------------------------------

    async def _take_slot(self, context: StepContext) -> dict[str, Any]:
        return network_to_json(await self.network_policies.take_slot(context.subject_id))

    def _commit_slot(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        guest = network_from_json(output).guest
        SandboxNetworkRepository().set_address(connection, record.subject_id, guest)

    async def _free_slot(self, context: StepContext) -> None:
        await self.network.ensure_slot_absent(context.subject_id)

    async def _make_volume(self, context: StepContext) -> dict[str, Any]:
        origin = context.outputs["image"]
        if disk := origin.get("disk"):
            if "restore" not in origin:
                # It is booted: what it had in memory when it was paused fits its disk no more.
                await self.memories.remove(context.subject_id)
            return disk
        if "restore" in origin and await self.storage.find_volume(context.subject_id) is not None:
            # Of an earlier run of this list: its guest may have written to it, and the memory to restore knows nothing
            # of that. Nobody else has used it yet.
            await self._stop_vmm(context)
            await self.storage.ensure_volume_absent(context.subject_id)
        base = DiskFile(Path(origin["path"]), origin["format"])
        # A restored machine knows its disk by the size that it had; it is grown once the guest runs.
        request = VolumeRequest(context.subject_id, base, origin["disk_mib"])
        return disk_to_json(await self.storage.ensure_volume(request))

    def _commit_volume(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        self.sandboxes.set_holds_volume(connection, record.subject_id, True)
        if "restore" not in record.outputs["image"]:
            SandboxMachineRepository().set_saved_memory(connection, record.subject_id, None)

    async def _remove_volume(self, context: StepContext) -> None:
        """With it goes what a paused sandbox has of its memory."""
        await self.memories.remove(context.subject_id)
        await self.storage.ensure_volume_absent(context.subject_id)

    async def _make_run_directory(self, context: StepContext) -> dict[str, Any]:
        await self.vmm.ensure_run_directory(context.subject_id, self.directory(context))
        return {}

    async def _remove_run_directory(self, context: StepContext) -> None:
        """The console lies in it. Its kept copy tells what the last run came to, until the sandbox itself goes."""
        if not context.unwind_requested:
            await self.consoles.keep(context.subject_id)
        await self.vmm.ensure_run_directory_absent(self.directory(context))
        if context.unwind_requested:
            await self.consoles.remove(context.subject_id)

    async def _attach_channel(self, context: StepContext) -> dict[str, Any]:
        """Before the VMM starts: the other end is then connected as soon as there is one."""
        with self.database.read() as connection:
            token = self.sandboxes.get_secrets(connection, context.subject_id).token
        await self.guests.ensure_channel(context.subject_id, self.vmm.guest_endpoint(self.directory(context)), token)
        return {}

    async def _detach_channel(self, context: StepContext) -> None:
        await self.guests.ensure_channel_absent(context.subject_id)

    async def _start_vmm(self, context: StepContext) -> dict[str, Any]:
        sandbox = self.sandbox(context)
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
            run_directory=self.directory(context),
            restore_from=restore_from_json(context.outputs["image"].get("restore")),
        )
        await self.gate.enter(sandbox.id)
        identity = await self._ensure_started(context, spec)
        stamp = await self.vmm.stamp(boot, spec.network.kind)
        machine = MachineRecord(stamp, boot.tools, boot.tools_id, boot.kernel_release)
        return {**process_to_json(identity), "machine": machine.to_json()}

    async def _ensure_started(self, context: StepContext, spec: MachineSpec) -> ProcessIdentity:
        """What an earlier run of this step has started holds the slot. One that boots goes on; one that is restored may
        have died half-way into its memory, so it is restored once more, unless that memory is given up."""
        if context.outputs["image"].get("adopted"):
            running = await self.vmm.find_process(spec.sandbox_id, spec.run_directory)
            if running is None:
                raise VmmError(
                    "the virtual machine has ended", code="vmm_ended", hint="start the sandbox from its disk"
                )
            return running
        try:
            return await start_connected(self.vmm, self.network, spec)
        except ConflictError as error:
            if error.code != "slot_in_use":
                raise
            running = await self.vmm.find_process(spec.sandbox_id, spec.run_directory)
            if running is None:
                raise
        if spec.restore_from is None:
            return running
        await self.vmm.ensure_stopped(spec.sandbox_id, spec.run_directory, running)
        return await start_connected(self.vmm, self.network, spec)

    async def _stop_vmm(self, context: StepContext) -> None:
        self.gate.leave(context.subject_id)
        await self.vmm.ensure_stopped(context.subject_id, self.directory(context), _process(context))

    def _commit_vmm(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        self.sandboxes.set_vmm_process(connection, record.subject_id, process_from_json(output))
        machine = MachineRecord.from_json(output["machine"])
        SandboxMachineRepository().set_machine(connection, record.subject_id, machine)

    async def _wait_for_guest(self, context: StepContext) -> dict[str, Any]:
        try:
            await self.while_machine_runs(context, self.guests.wait_ready(context.subject_id, self.guest_ready_seconds))
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
        attachment = network_from_json(context.outputs["network"])
        identity = replace(
            self._own_identity(context.subject_id),
            network=attachment.guest,
            mac_address="" if attachment.kind == "none" else attachment.mac_address,
            restored=_is_restored(context),
        )
        await self.while_machine_runs(context, self.guests.initialize(context.subject_id, identity))
        return {}

    async def give_new_name(self, context: StepContext) -> dict[str, Any]:
        """To a guest that runs and is somebody already: all else that it was told is its own, and its clock is kept."""
        sandbox = self.sandbox(context)
        await self.guests.rename(sandbox.id, sandbox.name, sandbox.spec.environment)
        return {}

    def _own_identity(self, sandbox_id: str) -> GuestIdentity:
        """As the row has it, with what must be fresh each time."""
        with self.database.read() as connection:
            sandbox = self.sandboxes.get(connection, sandbox_id)
            kept = self.sandboxes.get_secrets(connection, sandbox_id)
        return GuestIdentity(
            hostname=sandbox.name,
            machine_id=kept.machine_id,
            token=kept.token,
            entropy=secrets.token_bytes(_ENTROPY_BYTES),
            host_time_ns=time.time_ns(),
            environment=sandbox.spec.environment,
            host_key=make_ssh_host_key(),
            generation=str(uuid.uuid4()),
        )

    async def _thaw_guest(self, context: StepContext) -> dict[str, Any]:
        """The last of a restore: nothing of the guest's own has run so far, and nothing has left its card."""
        if _is_restored(context):
            await self.vmm.open_link(self.directory(context))
            await self.while_machine_runs(context, self.guests.thaw(context.subject_id))
        return {}

    async def _grow_file_system(self, context: StepContext) -> dict[str, Any]:
        sandbox = self.sandbox(context)
        if sandbox.spec.disk_mib <= max(sandbox.file_system_mib, context.outputs["image"].get("size_mib", 0)):
            return {"file_system_mib": sandbox.spec.disk_mib}
        if _is_restored(context):
            await grow_disk(self.vmm, self.storage, sandbox, self.directory(context))
        warning = await self.while_machine_runs(context, grow_root_file_system(self.guests, sandbox.id))
        return {"warning": warning} if warning else {"file_system_mib": sandbox.spec.disk_mib}

    def _commit_growth(self, connection: Connection, record: SagaRecord, output: dict[str, Any]) -> None:
        if file_system_mib := output.get("file_system_mib"):
            self.sandboxes.set_file_system_mib(connection, record.subject_id, file_system_mib)
        if message := output.get("warning"):
            self.outbox.append(connection, WARNING, record.subject_id, {"message": message})

    # --- stopping and resizing ----------------------------------------------------------------------------------------

    async def _shut_guest_down(self, context: StepContext) -> dict[str, Any]:
        """Ask, wait for the machine's end, and say whether it has to be cut off. A guest that cannot be asked is no
        reason to keep it."""
        identity = await self.vmm.find_process(context.subject_id, self.directory(context))
        if identity is None:
            return {"forced": False}
        grace_seconds = float(context.inputs.get("grace_seconds", self.stop_grace_seconds))
        try:
            async with asyncio.timeout(grace_seconds):
                await self.guests.shut_down(context.subject_id)
                await self.vmm.wait_ended(identity)
        except TimeoutError:
            reason = f"its guest did not shut down within {grace_seconds:g} s"
        except AtelierError as error:
            reason = f"its guest could not be asked to shut down: {error.message}"
        else:
            return {"forced": False}
        _logger.warning("sandbox %s is cut off: %s", context.subject_id, reason)
        return {"forced": True, "reason": reason}

    async def _grow_disk(self, context: StepContext) -> dict[str, Any]:
        await grow_disk(self.vmm, self.storage, self.sandbox(context), self.directory(context))
        return {}

    async def _grow_running_file_system(self, context: StepContext) -> dict[str, Any]:
        """Without a running guest nothing is to be done: the next start does it."""
        sandbox = self.sandbox(context)
        identity = await self.vmm.find_process(sandbox.id, self.directory(context))
        if sandbox.state is not SandboxState.RUNNING or identity is None:
            return {}
        warning = await grow_root_file_system(self.guests, sandbox.id)
        return {"warning": warning} if warning else {"file_system_mib": sandbox.spec.disk_mib}

    async def while_machine_runs(self, context: StepContext, work: Coroutine[Any, Any, _T]) -> _T:
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

    # --- what steps share ---------------------------------------------------------------------------------------------

    async def wake(self, context: StepContext) -> None:
        """Let the guest go on, whatever it was stopped in for its memory to be saved."""
        directory = self.directory(context)
        try:
            if await self.vmm.find_process(context.subject_id, directory) is not None:
                await self.vmm.go_on(directory)
                await self.guests.thaw(context.subject_id)
        except (VmmError, GuestUnreachableError):
            # Its end is the watcher's to tell.
            if await self.vmm.find_process(context.subject_id, directory) is not None:
                raise

    def sandbox(self, context: StepContext) -> Sandbox:
        with self.database.read() as connection:
            return self.sandboxes.get(connection, context.subject_id)

    def directory(self, context: StepContext) -> Path:
        return self.run.vmm_directory(context.subject_id)


def _process(context: StepContext) -> ProcessIdentity | None:
    output = context.outputs.get("vmm")
    return None if output is None else process_from_json(output)


def _is_restored(context: StepContext) -> bool:
    """Whether the machine goes on from a memory, and did not boot."""
    return "restore" in context.outputs["image"]


def _as_step(undo: Callable[[StepContext], Awaitable[None]]) -> Callable[[StepContext], Awaitable[dict[str, Any]]]:
    async def do(context: StepContext) -> dict[str, Any]:
        await undo(context)
        return {}

    return do


def _only_if_fresh(undo: Callable[[StepContext], Awaitable[None]]) -> Callable[[StepContext], Awaitable[None]]:
    async def undo_if_fresh(context: StepContext) -> None:
        if context.inputs.get("fresh"):
            await undo(context)

    return undo_if_fresh
