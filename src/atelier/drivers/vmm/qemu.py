"""Virtual machines by QEMU's ``microvm`` machine, under KVM where it really works, else in software emulation.

Used by the lifecycle. Each QEMU is confined (a user id of its own when the manager is root, all of QEMU's own sandbox
on deny, bounded files, no privilege to gain), receives every file as an open descriptor, belongs to init, and outlives
the manager. It never touches a process that it has not proved to be this installation's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

from atelier.drivers.vmm.disk_growth import file_size_limits, grow_disk
from atelier.drivers.vmm.kvm_probe import KvmAnswer, kvm_group_ids, probe_kvm
from atelier.drivers.vmm.qemu_arguments import (
    AcceleratorKind,
    OpenDisk,
    kernel_command_line,
    machine_arguments,
    process_name,
)
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.drivers.vmm.run_folder import RunFolder, opened, opened_machine
from atelier.drivers.vmm.vmm_users import claim_user, find_user_range
from atelier.host import command, processes
from atelier.host.disk_files import virtual_size_bytes
from atelier.host.files import ensure_private_folder, read_tail, trim_to_tail, write_atomically
from atelier.host.process_limits import may_raise_hard_limits
from atelier.host.processes import ResourceLimits
from atelier.host.tsc import cached_tsc_khz
from atelier.model.errors import CommandError, MissingProgramError, VmmError
from atelier.model.ids import is_sandbox_id
from atelier.model.layout import check_socket_path
from atelier.model.machine import BootFiles, Disk, GuestEndpoint, MachineSpec, ProcessIdentity

_PROGRAM = "qemu-system-x86_64"
_OPEN_FILES_LIMIT = 256
_START_TIMEOUT_SECONDS = 30.0
_STDERR_TAIL_BYTES = 1500
_MIB = 1024 * 1024


class QemuVmm:
    """``accelerator``: ``auto`` asks the KVM probe; ``kvm`` refuses to start a machine where the probe fails.
    ``cache_dir`` keeps the probe's answer and the counter's rate for this boot of the host."""

    def __init__(
        self, installation_id: str, *, cache_dir: Path, accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    ) -> None:
        self._installation_id = installation_id
        self._cache_dir = cache_dir
        self._wanted = accelerator
        self._users = find_user_range()
        self._chosen: AcceleratorKind | None = "tcg" if accelerator == "tcg" else None
        self._tsc_khz = 0
        self._may_raise_hard_limits: bool | None = None
        self._preparing = asyncio.Lock()
        self._starting: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.kvm_answer: KvmAnswer | None = None

    @property
    def name(self) -> str:
        """``qemu-tcg`` until a probe has shown that KVM works."""
        return "qemu-kvm" if self._chosen == "kvm" else "qemu-tcg"

    async def prepare(self, boot: BootFiles) -> AcceleratorKind:
        """Find out, once, what the first start needs to know: whether KVM works, the counter's rate, and whether the
        limits of a running process can be raised.

        Takes up to 3 s; ``ensure_started`` calls it if nobody did. Raises MissingProgramError, and VmmError when KVM was
        demanded and does not work.
        """
        _find_executable()
        async with self._preparing:
            if self._chosen is None:
                self._chosen = await self._choose(boot)
            if self._chosen == "tcg" and not self._tsc_khz:
                self._tsc_khz = await asyncio.to_thread(cached_tsc_khz, self._cache_dir / "tsc.json")
            if self._may_raise_hard_limits is None:
                self._may_raise_hard_limits = await may_raise_hard_limits()
            return self._chosen

    async def _choose(self, boot: BootFiles) -> AcceleratorKind:
        executable = _find_executable()
        version = (await command.run([str(executable), "--version"])).stdout.decode(errors="replace").splitlines()[0]
        self.kvm_answer = await probe_kvm(executable, version, boot, self._cache_dir / "kvm.json", self._users)
        if self.kvm_answer.usable:
            return "kvm"
        if self._wanted == "kvm":
            raise VmmError(
                f"KVM was asked for but does not work: {self.kvm_answer.reason}",
                hint="; ".join(filter(None, [self.kvm_answer.hint, "or set ATELIER_ACCELERATOR=auto"])),
            )
        return "tcg"

    def boot_id(self) -> str:
        return processes.boot_id()

    async def list_sandboxes(self, sandboxes_directory: Path) -> list[str]:
        prefix = process_name(self._installation_id, "")
        names = await asyncio.to_thread(processes.list_argument_values, _PROGRAM, "-name", prefix)
        with contextlib.suppress(FileNotFoundError):
            names += [entry.name for entry in sandboxes_directory.iterdir()]
        return sorted({name for name in names if is_sandbox_id(name)})

    async def ensure_run_directory(self, sandbox_id: str, run_directory: Path) -> None:
        for path in (RunFolder(run_directory).control_socket, RunFolder(run_directory).guest_socket):
            check_socket_path(path)
        ensure_private_folder(run_directory)

    async def ensure_run_directory_absent(self, run_directory: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(run_directory)

    async def ensure_started(self, spec: MachineSpec, network_descriptor: int | None = None) -> ProcessIdentity:
        lock = self._starting.setdefault(spec.sandbox_id, asyncio.Lock())
        async with lock:
            # Its log is made before a VMM is: without one there is nothing to look for.
            if RunFolder(spec.run_directory).stderr.exists() and (
                running := await self.find_process(spec.sandbox_id, spec.run_directory)
            ):
                return running
            await self.prepare(spec.boot)
            return await self._start(spec, network_descriptor)

    async def _start(self, spec: MachineSpec, network_descriptor: int | None) -> ProcessIdentity:
        folder = RunFolder(spec.run_directory)
        folder.stderr.unlink(missing_ok=True)
        file_size_bytes, ceiling_bytes = file_size_limits(
            virtual_size_bytes(spec.root.top), may_raise_hard_limits=self._may_raise_hard_limits is True
        )
        limits = ResourceLimits(_OPEN_FILES_LIMIT, file_size_bytes, ceiling_bytes, core_bytes=0)
        try:
            identity = await self._spawn(spec, network_descriptor, folder, limits)
        except CommandError as error:
            raise self._failure(spec, folder, error.message) from error
        try:
            write_atomically(folder.identity, json.dumps(asdict(identity)).encode(), durable=False)
            async with await QmpConnection.open(
                folder.control_socket, timeout_seconds=_START_TIMEOUT_SECONDS
            ) as control:
                status = await control.query("query-status")
            if status.get("status") != "running":
                raise VmmError(f"QEMU came up in an unexpected state: {status}")
        except VmmError as error:
            await processes.kill_and_wait(identity)
            raise self._failure(spec, folder, error.message) from error
        return identity

    async def _spawn(
        self, spec: MachineSpec, network_descriptor: int | None, folder: RunFolder, limits: ResourceLimits
    ) -> ProcessIdentity:
        assert self._chosen is not None
        with contextlib.ExitStack() as stack:
            descriptors = stack.enter_context(opened_machine(folder, spec.boot))
            disks = tuple(_open_disk(disk, stack) for disk in (spec.root, spec.tools))
            claim = stack.enter_context(claim_user(self._users, spec.sandbox_id)) if self._users else None
            arguments = machine_arguments(
                _find_executable(),
                process_name(self._installation_id, spec.sandbox_id),
                accelerator=self._chosen,
                vcpu_count=spec.vcpu_count,
                memory_mib=spec.memory_mib,
                command_line=kernel_command_line(self._chosen, self._tsc_khz),
                descriptors=descriptors,
                disks=disks,
                network=spec.network,
                network_descriptor=network_descriptor,
            )
            groups = (kvm_group_ids() or ()) if self._chosen == "kvm" else ()
            return await processes.start_detached(
                arguments,
                stderr_path=folder.stderr,
                user=claim.process_user(groups) if claim else None,
                limits=limits,
                pass_descriptors=[
                    *asdict(descriptors).values(),
                    *(descriptor for disk in disks for descriptor in disk.descriptors),
                    *([claim.claim_descriptor] if claim else []),
                    *([network_descriptor] if network_descriptor is not None else []),
                ],
            )

    def _failure(self, spec: MachineSpec, folder: RunFolder, reason: str) -> VmmError:
        said = read_tail(folder.stderr, _STDERR_TAIL_BYTES).decode(errors="replace").strip()
        hint = "see 'atelier doctor'"
        if "annot allocate memory" in said or "annot set up guest memory" in said:
            hint = "ask for less memory, or remove sandboxes"
        elif "KVM" in said:
            hint = "set ATELIER_ACCELERATOR=tcg"
        return VmmError(f"QEMU did not start the machine of sandbox {spec.sandbox_id}: {said or reason}", hint=hint)

    async def find_process(self, sandbox_id: str, run_directory: Path) -> ProcessIdentity | None:
        if (kept := _kept_identity(RunFolder(run_directory))) and self._is_ours(kept, sandbox_id):
            return kept
        # Nobody wrote down what a manager started that died at that very moment.
        found = await asyncio.to_thread(processes.find_processes, _PROGRAM, self._marks(sandbox_id))
        return found[0] if found else None

    def _marks(self, sandbox_id: str) -> list[str]:
        """The arguments that no other process of this executable has."""
        return ["-name", process_name(self._installation_id, sandbox_id)]

    def _is_ours(self, identity: ProcessIdentity, sandbox_id: str) -> bool:
        """Proved by pid, start time, boot id, executable, and the sandbox's id in its arguments."""
        return processes.runs(identity, _PROGRAM, self._marks(sandbox_id))

    async def ensure_stopped(self, sandbox_id: str, run_directory: Path, identity: ProcessIdentity | None) -> None:
        if identity is not None and self._is_ours(identity, sandbox_id):
            await processes.kill_and_wait(identity)
        while found := await self.find_process(sandbox_id, run_directory):
            await processes.kill_and_wait(found)

    async def wait_ended(self, identity: ProcessIdentity) -> None:
        await processes.wait_ended(identity)

    async def resident_bytes(self, identities: Sequence[ProcessIdentity]) -> int:
        return await asyncio.to_thread(lambda: sum(map(processes.resident_bytes, identities)))

    async def resize_disk(self, run_directory: Path, serial: str, size_mib: int) -> None:
        folder = RunFolder(run_directory)
        identity = _kept_identity(folder)
        if identity is None:
            raise VmmError(f"no machine runs in {run_directory}")
        async with await QmpConnection.open(folder.control_socket) as control:
            await grow_disk(control, identity, serial, size_mib * _MIB)

    def guest_endpoint(self, run_directory: Path) -> GuestEndpoint:
        return GuestEndpoint("virtio_serial", RunFolder(run_directory).guest_socket)

    async def console_tail(self, run_directory: Path, limit_bytes: int) -> bytes:
        return read_tail(RunFolder(run_directory).console, limit_bytes)

    async def trim_console(self, run_directory: Path, limit_bytes: int) -> None:
        # Half of it stays, so that a console at the limit is not rewritten each time.
        trim_to_tail(RunFolder(run_directory).console, limit_bytes, keep_bytes=limit_bytes // 2)

    async def resume_after_full_disk(self, run_directory: Path) -> bool:
        # Source: QEMU's werror=enospc, the default: a full host halts the machine instead of telling its guest.
        async with await QmpConnection.open(RunFolder(run_directory).control_socket) as control:
            if (await control.query("query-status")).get("status") != "io-error":
                return False
            await control.execute("cont")
        return True


def _kept_identity(folder: RunFolder) -> ProcessIdentity | None:
    """What was written down at the start, if that process lives."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        kept = ProcessIdentity(**json.loads(folder.identity.read_bytes()))
        if processes.is_alive(kept):
            return kept
    return None


def _find_executable() -> Path:
    found = shutil.which(_PROGRAM)
    if found is None:
        raise MissingProgramError(f"{_PROGRAM} is not installed", hint="apt-get install qemu-system-x86")
    return Path(found)


def _open_disk(disk: Disk, stack: contextlib.ExitStack) -> OpenDisk:
    top = stack.enter_context(opened(disk.top.path, os.O_RDONLY if disk.read_only else os.O_RDWR))
    backing = [stack.enter_context(opened(file.path)) for file in disk.backing]
    return OpenDisk(disk, (top, *backing))
