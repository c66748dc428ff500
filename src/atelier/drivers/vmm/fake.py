"""A VMM that starts nothing: machines are words in memory. For mock mode and tests; cheap enough for thousands.

Faults come from ``faults``; ``end_machine`` lets one die as a crashed VMM would, ``reboot`` all of them as with their
host. Its pids lie above any that Linux gives, so nothing can mistake them for a process.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from atelier.drivers.faults import Faults
from atelier.drivers.vmm.fake_memory import GuestMemory, SavedGuest, read_saved, write_image, write_stream
from atelier.drivers.vmm.interface import SavingMoment
from atelier.model.errors import ConflictError, InvalidRequestError, VmmError
from atelier.model.ids import is_sandbox_id
from atelier.model.machine import (
    BootFiles,
    DiskFile,
    GuestEndpoint,
    MachineSpec,
    MachineStamp,
    MemoryImage,
    MemoryStream,
    ProcessIdentity,
    SavedMachine,
)

_VERSION = "1.0.0"
_FIRST_PID = 2**22 + 1
"""Linux gives pids up to 2**22. Source: proc(5), pid_max."""


_FileKey = tuple[int, int] | Path


@dataclass(slots=True)
class _Machine:
    spec: MachineSpec
    identity: ProcessIdentity
    disks_mib: dict[str, int]
    """By serial, as ``resize_disk`` left them: how large they were before is written nowhere."""
    disks_top: dict[str, _FileKey]
    """By serial, the file that the guest writes to."""
    link_open: bool
    runs: bool = True
    is_saving: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class FakeVmm:
    """Each has a boot id of its own: its machines end with the manager that it belongs to. ``guest_memory``: what the
    guests remember, which goes with a saved machine."""

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        machine_resident_bytes: int = 0,
        guest_memory: GuestMemory | None = None,
    ) -> None:
        self.faults = faults or Faults()
        self.guest_memory = guest_memory
        self.machine_resident_bytes = machine_resident_bytes
        self.run_directories: dict[Path, bytearray] = {}
        """Each with what its console holds."""
        self._machines: dict[str, _Machine] = {}
        self._by_pid: dict[int, _Machine] = {}
        self._next_pid = _FIRST_PID
        self._boot_id = str(uuid.uuid4())

    @property
    def name(self) -> str:
        return "fake"

    @property
    def opens_network(self) -> bool:
        return False

    @property
    def running(self) -> list[str]:
        """Sandbox ids of the machines that run."""
        return list(self._machines)

    def boot_id(self) -> str:
        return self._boot_id

    async def list_sandboxes(self, sandboxes_directory: Path) -> list[str]:
        await self.faults.before("list_sandboxes")
        names = {path.name for path in self.run_directories if path.parent == sandboxes_directory}
        return sorted(self._machines.keys() | {name for name in names if is_sandbox_id(name)})

    async def ensure_run_directory(self, sandbox_id: str, run_directory: Path) -> None:
        await self.faults.before("ensure_run_directory")
        self.run_directories.setdefault(run_directory, bytearray())

    async def ensure_run_directory_absent(self, run_directory: Path) -> None:
        await self.faults.before("ensure_run_directory_absent")
        self.run_directories.pop(run_directory, None)

    async def ensure_started(self, spec: MachineSpec, network_descriptor: int | None = None) -> ProcessIdentity:
        await self.faults.before("ensure_started")
        if running := self._machines.get(spec.sandbox_id):
            return running.identity
        console = self.run_directories.get(spec.run_directory)
        if console is None:
            raise VmmError(f"the machine cannot be started: there is no {spec.run_directory}")
        if spec.restore_from is not None:
            self._restore(spec, spec.restore_from)
        verb = "started" if spec.restore_from is None else "restored"
        console += f"fake machine of sandbox {spec.sandbox_id} {verb}\n".encode()
        identity = ProcessIdentity(self._next_pid, self._next_pid, self._boot_id)
        disks = (spec.root, spec.tools)
        machine = _Machine(
            spec,
            identity,
            disks_mib={disk.serial: 0 for disk in disks},
            disks_top={disk.serial: _file_key(disk.top) for disk in disks},
            link_open=spec.restore_from is None,
        )
        self._next_pid += 1
        self._machines[spec.sandbox_id] = machine
        self._by_pid[machine.identity.pid] = machine
        return machine.identity

    async def find_process(self, sandbox_id: str, run_directory: Path) -> ProcessIdentity | None:
        await self.faults.before("find_process")
        machine = self._machines.get(sandbox_id)
        return machine.identity if machine else None

    async def ensure_stopped(self, sandbox_id: str, run_directory: Path, identity: ProcessIdentity | None) -> None:
        await self.faults.before("ensure_stopped")
        self.end_machine(sandbox_id)

    def end_machine(self, sandbox_id: str) -> None:
        """The machine ends, as if its VMM had been killed; nothing if there is none."""
        if machine := self._machines.pop(sandbox_id, None):
            del self._by_pid[machine.identity.pid]
            machine.ended.set()

    def reboot(self) -> None:
        """The host goes down and comes up again: no machine runs, and what lay in the run directories is gone."""
        for sandbox_id in self.running:
            self.end_machine(sandbox_id)
        self.run_directories.clear()
        self._boot_id = str(uuid.uuid4())

    async def wait_ended(self, identity: ProcessIdentity) -> None:
        await self.faults.before("wait_ended")
        machine = self._by_pid.get(identity.pid)
        if machine is not None and machine.identity == identity:
            await machine.ended.wait()

    async def resident_bytes(self, identities: Sequence[ProcessIdentity]) -> int:
        await self.faults.before("resident_bytes")
        running = {machine.identity for machine in self._machines.values()}
        return len(running.intersection(identities)) * self.machine_resident_bytes

    async def resize_disk(self, run_directory: Path, serial: str, size_mib: int) -> None:
        await self.faults.before("resize_disk")
        machine = self._machine_with(run_directory, serial)
        if size_mib < machine.disks_mib[serial]:
            raise InvalidRequestError(
                f"the disk has {machine.disks_mib[serial]} MiB and cannot shrink to {size_mib} MiB",
                code="disk_cannot_shrink",
            )
        machine.disks_mib[serial] = size_mib

    def guest_endpoint(self, run_directory: Path) -> GuestEndpoint:
        return GuestEndpoint("fake", run_directory / "guest.sock")

    async def console_tail(self, run_directory: Path, limit_bytes: int) -> bytes:
        await self.faults.before("console_tail")
        console = self.run_directories.get(run_directory, bytearray())
        return bytes(console[max(0, len(console) - limit_bytes) :])

    async def trim_console(self, run_directory: Path, limit_bytes: int) -> None:
        await self.faults.before("trim_console")
        console = self.run_directories.get(run_directory, bytearray())
        if len(console) > limit_bytes:
            del console[: len(console) - limit_bytes // 2]

    async def resume_after_full_disk(self, run_directory: Path) -> bool:
        await self.faults.before("resume_after_full_disk")
        return False

    # --- saved machines -----------------------------------------------------------------------------------------------

    async def stamp(self, boot: BootFiles, network_kind: str) -> MachineStamp:
        await self.faults.before("stamp")
        return MachineStamp("fake", _VERSION, "fake", "fake", "", 0, network_kind, 1)

    def is_link_open(self, sandbox_id: str) -> bool:
        """Whether the network card of this running machine is connected."""
        return self._machines[sandbox_id].link_open

    async def open_link(self, run_directory: Path) -> None:
        await self.faults.before("open_link")
        self._machine_in(run_directory).link_open = True

    async def save(
        self,
        run_directory: Path,
        target: Path,
        *,
        before_stop: SavingMoment | None = None,
        at_stop: SavingMoment | None = None,
        afterwards: SavingMoment | None = None,
    ) -> SavedMachine:
        await self.faults.before("save")
        machine = self._machine_in(run_directory)
        if machine.is_saving:
            raise ConflictError(f"the machine in {run_directory} is being saved already", code="saving")
        machine.is_saving = machine.runs = True
        try:
            if before_stop is not None:
                await before_stop()
            machine.runs = False
            if at_stop is not None:
                await at_stop()
            # It may have ended meanwhile.
            spec = self._machine_in(run_directory).spec
            memory = self.guest_memory.dump(spec.sandbox_id) if self.guest_memory else b""
            size_bytes = write_stream(SavedGuest(str(uuid.uuid4()), spec.memory_mib, memory), target)
            machine.runs = afterwards is not None
            if afterwards is not None:
                await afterwards()
        except BaseException:
            machine.runs = True
            raise
        finally:
            machine.is_saving = False
        return SavedMachine(0.0, size_bytes, _VERSION)

    async def go_on(self, run_directory: Path) -> None:
        await self.faults.before("go_on")
        self._machine_in(run_directory).runs = True

    def is_stopped(self, sandbox_id: str) -> bool:
        """Whether this machine stands still, as saving leaves it."""
        return not self._machines[sandbox_id].runs

    @asynccontextmanager
    async def disk_switch(self, run_directory: Path, serial: str, top: DiskFile) -> AsyncGenerator[SavingMoment]:
        async def carry_out() -> None:
            await self.faults.before("switch_disk")
            self._machine_with(run_directory, serial).disks_top[serial] = _file_key(top)

        self._machine_with(run_directory, serial)
        yield carry_out

    async def writes_to(self, run_directory: Path, serial: str, file: DiskFile) -> bool:
        await self.faults.before("writes_to")
        return self._machine_with(run_directory, serial).disks_top[serial] == _file_key(file)

    async def bake(self, stream: MemoryStream, stamp: MachineStamp, spec: MachineSpec, image: MemoryImage) -> None:
        await self.faults.before("bake")
        try:
            saved = _fitting(read_saved(stream), spec)
        except VmmError as error:
            raise VmmError(
                f"the saved machine {stream.path} could not be baked: {error.message}",
                code="bake_failed",
                hint="it is damaged",
            ) from error
        write_image(saved, image)

    def _restore(self, spec: MachineSpec, source: MemoryStream | MemoryImage) -> None:
        saved = _fitting(read_saved(source), spec)
        if self.guest_memory is not None:
            self.guest_memory.load(spec.sandbox_id, saved.memory)

    def _machine_in(self, run_directory: Path) -> _Machine:
        for machine in self._machines.values():
            if machine.spec.run_directory == run_directory:
                return machine
        raise VmmError(f"no machine runs in {run_directory}")

    def _machine_with(self, run_directory: Path, serial: str) -> _Machine:
        machine = self._machine_in(run_directory)
        if serial not in machine.disks_mib:
            raise VmmError(f"the machine in {run_directory} has no disk {serial}")
        return machine


def _file_key(file: DiskFile) -> _FileKey:
    """What a file is known by after it was renamed; by its name where a fake storage has made none."""
    try:
        found = file.path.stat()
    except FileNotFoundError:
        return file.path
    return found.st_dev, found.st_ino


def _fitting(saved: SavedGuest, spec: MachineSpec) -> SavedGuest:
    if saved.memory_mib != spec.memory_mib:
        raise VmmError(
            f"a machine with {spec.memory_mib} MiB cannot go on with the memory of one with {saved.memory_mib} MiB",
            code="restore_failed",
        )
    return saved
