"""A VMM that starts nothing: machines are words in memory. For mock mode and tests; cheap enough for thousands.

Faults come from ``faults``; ``end_machine`` lets one die as a crashed VMM would, ``reboot`` all of them as with their
host. Its pids lie above any that Linux gives, so nothing can mistake them for a process.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atelier.drivers.faults import Faults
from atelier.model.errors import InvalidRequestError, VmmError
from atelier.model.ids import is_sandbox_id
from atelier.model.machine import GuestEndpoint, MachineSpec, ProcessIdentity

_FIRST_PID = 2**22 + 1
"""Linux gives pids up to 2**22. Source: proc(5), pid_max."""


@dataclass(slots=True)
class _Machine:
    spec: MachineSpec
    identity: ProcessIdentity
    disks_mib: dict[str, int]
    """By serial, as ``resize_disk`` left them: how large they were before is written nowhere."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class FakeVmm:
    """Each has a boot id of its own: its machines end with the manager that it belongs to."""

    def __init__(self, faults: Faults | None = None, *, machine_resident_bytes: int = 0) -> None:
        self.faults = faults or Faults()
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
        console += f"fake machine of sandbox {spec.sandbox_id} started\n".encode()
        identity = ProcessIdentity(self._next_pid, self._next_pid, self._boot_id)
        machine = _Machine(spec, identity, {disk.serial: 0 for disk in (spec.root, spec.tools)})
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
        running = (machine for machine in self._machines.values() if machine.spec.run_directory == run_directory)
        machine = next(running, None)
        if machine is None or serial not in machine.disks_mib:
            raise VmmError(f"no machine with a disk {serial} runs in {run_directory}")
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
