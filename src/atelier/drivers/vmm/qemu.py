"""Virtual machines by QEMU's ``microvm`` machine, under KVM where it really works, else in software emulation.

Used by the lifecycle. Each QEMU is confined (a user id of its own when the manager is root, all of QEMU's own sandbox
on deny, bounded files, no privilege to gain), receives every file as an open descriptor, belongs to init, and outlives
the manager. It never touches a process that it has not proved to be this installation's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal
from weakref import WeakValueDictionary

from atelier.drivers.vmm.confinement import Confinement
from atelier.drivers.vmm.disk_growth import file_size_limits, grow_disk
from atelier.drivers.vmm.interface import SavingMoment
from atelier.drivers.vmm.kvm_probe import KvmAnswer, probe_kvm
from atelier.drivers.vmm.qemu_arguments import NETWORK_NODE, AcceleratorKind, OpenMemory, process_name
from atelier.drivers.vmm.qemu_baking import BAKING, bake_image
from atelier.drivers.vmm.qemu_disks import DiskSwitch, limit_disk, open_disk, writes_to
from atelier.drivers.vmm.qemu_launch import PROGRAM, FileLimits, QemuHost, find_executable, launch, machine_limits
from atelier.drivers.vmm.qemu_memory import SealedImages
from atelier.drivers.vmm.qemu_migration import load_state, query_status, run_on
from atelier.drivers.vmm.qemu_saving import save_machine
from atelier.drivers.vmm.qemu_stamp import make_stamp, read_version, vmm_name
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.drivers.vmm.run_folder import RunFolder, sandboxes_of
from atelier.drivers.vmm.vmm_users import find_user_range
from atelier.host import command, processes
from atelier.host.disk_files import virtual_size_bytes
from atelier.host.files import ensure_folder_absent, ensure_private_folder, read_tail
from atelier.host.process_limits import may_raise_hard_limits
from atelier.host.tsc import cached_tsc_khz
from atelier.model.errors import CommandError, ConflictError, VmmError
from atelier.model.layout import check_socket_path
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
from atelier.model.machine_limits import UNLIMITED, DiskRate

_START_TIMEOUT_SECONDS = 30.0
_LOAD_TIMEOUT_SECONDS = 300.0
"""Of a command: QEMU answers none while it loads a machine's memory."""
_STDERR_TAIL_BYTES = 1500
_MIB = 1024 * 1024
_NOT_YET_RUNNING = frozenset({"inmigrate", "prelaunch", "paused"})
"""What a machine is in until its restoration is through."""


class QemuVmm:
    """``accelerator``: ``auto`` asks the KVM probe; ``kvm`` refuses to start a machine where the probe fails.
    ``cache_dir`` keeps the probe's answer and the counter's rate for this boot of the host. ``confinement`` None: a machine
    takes of the host what its processors and memory come to."""

    def __init__(
        self,
        installation_id: str,
        *,
        cache_dir: Path,
        accelerator: Literal["auto", "kvm", "tcg"] = "auto",
        disk_rate: DiskRate = UNLIMITED,
        confinement: Confinement | None = None,
    ) -> None:
        self._installation_id = installation_id
        self._cache_dir = cache_dir
        self._wanted = accelerator
        self._disk_rate = disk_rate
        self._confinement = confinement
        self._users = find_user_range()
        self._chosen: AcceleratorKind | None = "tcg" if accelerator == "tcg" else None
        self._tsc_khz = 0
        self._may_raise_hard_limits: bool | None = None
        self._preparing = asyncio.Lock()
        self._starting: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._images = SealedImages()
        self._saving: dict[Path, QmpConnection | None] = {}
        """By run directory, the connection over which a machine is being saved, once there is one."""
        self._version: tuple[tuple[int, int], str] | None = None
        self.kvm_answer: KvmAnswer | None = None

    @property
    def name(self) -> str:
        """``qemu-tcg`` until a probe has shown that KVM works."""
        return vmm_name(self._chosen or "tcg")

    @property
    def opens_network(self) -> bool:
        return False

    async def prepare(self, boot: BootFiles) -> AcceleratorKind:
        """Find out, once, what the first start needs to know: whether KVM works, the counter's rate, and whether the
        limits of a running process can be raised.

        Takes up to 3 s (60 s where KVM was demanded); ``ensure_started`` calls it if nobody did. Raises
        MissingProgramError, and VmmError when KVM was demanded and does not work.
        """
        find_executable()
        async with self._preparing:
            if self._chosen is None:
                self._chosen = await self._choose(boot)
            await self._learn(self._chosen)
            return self._chosen

    async def _learn(self, accelerator: AcceleratorKind) -> None:
        if accelerator == "tcg" and not self._tsc_khz:
            self._tsc_khz = await asyncio.to_thread(cached_tsc_khz, self._cache_dir / "tsc.json")
        if self._may_raise_hard_limits is None:
            self._may_raise_hard_limits = await may_raise_hard_limits()

    async def _choose(self, boot: BootFiles) -> AcceleratorKind:
        executable = find_executable()
        version = (await command.run([str(executable), "--version"])).stdout.decode(errors="replace").splitlines()[0]
        is_demanded = self._wanted == "kvm"
        cache_file = self._cache_dir / "kvm.json"
        self.kvm_answer = await probe_kvm(executable, version, boot, cache_file, self._users, is_demanded=is_demanded)
        if self.kvm_answer.usable:
            return "kvm"
        if is_demanded:
            raise VmmError(
                f"KVM was asked for but does not work: {self.kvm_answer.reason}",
                hint="; ".join(
                    filter(
                        None,
                        [
                            self.kvm_answer.hint,
                            "or set ATELIER_ACCELERATOR=tcg: software emulation, some ten times slower",
                        ],
                    )
                ),
            )
        return "tcg"

    def boot_id(self) -> str:
        return processes.boot_id()

    async def list_sandboxes(self, sandboxes_directory: Path) -> list[str]:
        prefix = process_name(self._installation_id, "")
        names = await asyncio.to_thread(processes.list_argument_values, PROGRAM, "-name", prefix)
        return sandboxes_of(names, sandboxes_directory)

    async def ensure_run_directory(self, sandbox_id: str, run_directory: Path) -> None:
        for path in (RunFolder(run_directory).control_socket, RunFolder(run_directory).guest_socket):
            check_socket_path(path)
        ensure_private_folder(run_directory)

    async def ensure_run_directory_absent(self, run_directory: Path) -> None:
        ensure_folder_absent(run_directory)

    async def ensure_started(self, spec: MachineSpec, network_descriptor: int | None = None) -> ProcessIdentity:
        lock = self._starting.setdefault(spec.sandbox_id, asyncio.Lock())
        async with lock:
            # Its log is made before a VMM is: without one there is nothing to look for.
            if RunFolder(spec.run_directory).stderr.exists() and (
                running := await self.find_process(spec.sandbox_id, spec.run_directory)
            ):
                if spec.restore_from is None or await self._is_restored(spec, running):
                    return running
                await processes.kill_and_wait(running)
            await self.prepare(spec.boot)
            return await self._start(spec, network_descriptor)

    async def _is_restored(self, spec: MachineSpec, running: ProcessIdentity) -> bool:
        """Whether whoever began to restore it came to the point of letting it run."""
        try:
            async with self._control(spec.run_directory, _LOAD_TIMEOUT_SECONDS) as control:
                return await query_status(control) not in _NOT_YET_RUNNING
        except VmmError:
            if processes.is_alive(running):
                raise
            return False

    async def _start(self, spec: MachineSpec, network_descriptor: int | None) -> ProcessIdentity:
        folder = RunFolder(spec.run_directory)
        folder.stderr.unlink(missing_ok=True)
        try:
            identity = await self._launch(spec, network_descriptor)
        except CommandError as error:
            raise self._failure(spec, folder, error.message) from error
        try:
            folder.keep_identity(identity)
            if self._confinement is not None:
                await self._confinement.confine(spec.sandbox_id, identity, machine_limits(spec))
            timeout_seconds = _LOAD_TIMEOUT_SECONDS if spec.restore_from else _START_TIMEOUT_SECONDS
            async with await QmpConnection.open(folder.control_socket, timeout_seconds=timeout_seconds) as control:
                if self._disk_rate:
                    await limit_disk(control, spec.root.serial, self._disk_rate)
                if spec.restore_from is not None:
                    await _restore(control, spec)
                status = await query_status(control)
            if status != "running":
                raise VmmError(f"QEMU came up in an unexpected state: {status}")
        except VmmError as error:
            await processes.kill_and_wait(identity)
            raise self._failure(spec, folder, error.message) from error
        except BaseException:
            # Given up in the middle of loading: nobody would let it run.
            await asyncio.shield(processes.kill_and_wait(identity))
            raise
        return identity

    async def _launch(self, spec: MachineSpec, network_descriptor: int | None) -> ProcessIdentity:
        limits = FileLimits(
            *file_size_limits(
                virtual_size_bytes(spec.root.top), may_raise_hard_limits=self._may_raise_hard_limits is True
            )
        )
        async with contextlib.AsyncExitStack() as stack:
            memory: OpenMemory | None = None
            if isinstance(spec.restore_from, MemoryImage):
                opened = self._images.opened(spec.restore_from.memory, spec.memory_mib * _MIB)
                memory = OpenMemory(await stack.enter_async_context(opened), shared=False)
            files = stack.enter_context(contextlib.ExitStack())
            return await launch(
                self._host(await self.prepare(spec.boot)),
                spec.sandbox_id,
                spec,
                disks=[open_disk(disk, files) for disk in (spec.root, spec.tools)],
                limits=limits,
                memory=memory,
                network_descriptor=network_descriptor,
                boots=spec.restore_from is None,
            )

    def _host(self, accelerator: AcceleratorKind) -> QemuHost:
        return QemuHost(self._installation_id, accelerator, self._tsc_khz, self._users)

    def _failure(self, spec: MachineSpec, folder: RunFolder, reason: str) -> VmmError:
        said = read_tail(folder.stderr, _STDERR_TAIL_BYTES).decode(errors="replace").strip()
        if spec.restore_from is not None:
            return VmmError(
                f"QEMU could not go on with the saved machine of sandbox {spec.sandbox_id}: {said or reason}",
                code="restore_failed",
                hint="what was saved is damaged, or another QEMU's; start the sandbox from its disk",
            )
        hint = "see 'atelier doctor'"
        if "annot allocate memory" in said or "annot set up guest memory" in said:
            hint = "ask for less memory, or remove sandboxes"
        elif "KVM" in said:
            hint = "set ATELIER_ACCELERATOR=tcg"
        return VmmError(f"QEMU did not start the machine of sandbox {spec.sandbox_id}: {said or reason}", hint=hint)

    async def find_process(self, sandbox_id: str, run_directory: Path) -> ProcessIdentity | None:
        if (kept := RunFolder(run_directory).find_identity()) and self._is_ours(kept, sandbox_id):
            return kept
        # Nobody wrote down what a manager started that died at that very moment.
        found = await asyncio.to_thread(processes.find_processes, PROGRAM, self._marks(sandbox_id))
        return found[0] if found else None

    def _marks(self, sandbox_id: str) -> list[str]:
        """The arguments that no other process of this executable has."""
        return ["-name", process_name(self._installation_id, sandbox_id)]

    def _is_ours(self, identity: ProcessIdentity, sandbox_id: str) -> bool:
        """Proved by pid, start time, boot id, executable, and the sandbox's id in its arguments."""
        return processes.runs(identity, PROGRAM, self._marks(sandbox_id))

    async def ensure_stopped(self, sandbox_id: str, run_directory: Path, identity: ProcessIdentity | None) -> None:
        if identity is not None and self._is_ours(identity, sandbox_id):
            await processes.kill_and_wait(identity)
        while found := await self.find_process(sandbox_id, run_directory):
            await processes.kill_and_wait(found)
        await self._end_baking(sandbox_id)

    async def _end_baking(self, sandbox_id: str) -> None:
        """End what a manager that died in the middle of a bake has left."""
        marks = self._marks(BAKING + sandbox_id)
        for found in await asyncio.to_thread(processes.find_processes, PROGRAM, marks):
            await processes.kill_and_wait(found)

    async def wait_ended(self, identity: ProcessIdentity) -> None:
        await processes.wait_ended(identity)

    async def resident_bytes(self, identities: Sequence[ProcessIdentity]) -> int:
        return await asyncio.to_thread(lambda: sum(map(processes.resident_bytes, identities)))

    async def resize_disk(self, run_directory: Path, serial: str, size_mib: int) -> None:
        folder = RunFolder(run_directory)
        identity = folder.find_identity()
        if identity is None:
            raise VmmError(f"no machine runs in {run_directory}")
        async with self._control(run_directory) as control:
            await grow_disk(control, identity, serial, size_mib * _MIB)

    def guest_endpoint(self, run_directory: Path) -> GuestEndpoint:
        return GuestEndpoint("virtio_serial", RunFolder(run_directory).guest_socket)

    async def console_tail(self, run_directory: Path, limit_bytes: int) -> bytes:
        return read_tail(RunFolder(run_directory).console, limit_bytes)

    async def trim_console(self, run_directory: Path, limit_bytes: int) -> None:
        RunFolder(run_directory).trim_console(limit_bytes)

    async def resume_after_full_disk(self, run_directory: Path) -> bool:
        # Source: QEMU's werror=enospc, the default: a full host halts the machine instead of telling its guest.
        async with self._control(run_directory) as control:
            if await query_status(control) != "io-error":
                return False
            await control.execute("cont")
        return True

    # --- saved machines -----------------------------------------------------------------------------------------------

    async def stamp(self, boot: BootFiles, network_kind: str) -> MachineStamp:
        accelerator = await self.prepare(boot)
        executable = find_executable()
        found = executable.stat()
        build = (found.st_ino, found.st_mtime_ns)
        if self._version is None or self._version[0] != build:
            self._version = (build, await read_version(executable))
        return make_stamp(self._version[1], accelerator, self._tsc_khz, network_kind)

    async def open_link(self, run_directory: Path) -> None:
        async with self._control(run_directory) as control:
            await _set_link(control, up=True)

    async def save(
        self,
        run_directory: Path,
        target: Path,
        *,
        before_stop: SavingMoment | None = None,
        at_stop: SavingMoment | None = None,
        afterwards: SavingMoment | None = None,
    ) -> SavedMachine:
        if run_directory in self._saving:
            raise ConflictError(f"the machine in {run_directory} is being saved already", code="saving")
        self._saving[run_directory] = None
        try:
            async with self._control(run_directory, _START_TIMEOUT_SECONDS) as control:
                self._saving[run_directory] = control
                return await save_machine(
                    control, target, before_stop=before_stop, at_stop=at_stop, afterwards=afterwards
                )
        finally:
            del self._saving[run_directory]

    async def go_on(self, run_directory: Path) -> None:
        async with self._control(run_directory) as control:
            await run_on(control)

    @asynccontextmanager
    async def disk_switch(self, run_directory: Path, serial: str, top: DiskFile) -> AsyncGenerator[SavingMoment]:
        switch = DiskSwitch(serial, top)

        async def carry_out() -> None:
            async with self._control(run_directory) as control:
                await switch.carry_out(control)

        async with self._control(run_directory) as control:
            await switch.prepare(control)
        try:
            yield carry_out
        finally:
            # With a machine that is gone went what was made ready in it.
            with contextlib.suppress(VmmError):
                async with self._control(run_directory) as control:
                    await switch.forget(control)

    async def writes_to(self, run_directory: Path, serial: str, file: DiskFile) -> bool:
        async with self._control(run_directory) as control:
            return await writes_to(control, serial, file)

    async def bake(self, stream: MemoryStream, stamp: MachineStamp, spec: MachineSpec, image: MemoryImage) -> None:
        # It boots nothing that KVM could be tried with, and goes on under nothing else than what it ran under.
        accelerator: AcceleratorKind = "kvm" if stamp.vmm == vmm_name("kvm") else "tcg"
        find_executable()
        async with self._preparing:
            await self._learn(accelerator)
        await self._end_baking(spec.sandbox_id)
        await self.ensure_run_directory(spec.sandbox_id, spec.run_directory)
        folder = RunFolder(spec.run_directory)
        try:
            await bake_image(self._host(accelerator), stream, spec, image)
        except (VmmError, CommandError) as error:
            said = read_tail(folder.stderr, _STDERR_TAIL_BYTES).decode(errors="replace").strip()
            if isinstance(error, CommandError) and not said:
                raise
            raise VmmError(
                f"the saved machine {stream.path} could not be baked: {said or error.message}",
                code="bake_failed",
                hint="it is damaged, or another QEMU's",
            ) from error
        finally:
            await self.ensure_run_directory_absent(spec.run_directory)

    @asynccontextmanager
    async def _control(self, run_directory: Path, timeout_seconds: float = 10.0) -> AsyncGenerator[QmpConnection]:
        """The machine's control socket. While it is saved the connection that does so is everybody's: QEMU takes one."""
        if saving := self._saving.get(run_directory):
            yield saving
            return
        socket = RunFolder(run_directory).control_socket
        async with await QmpConnection.open(socket, timeout_seconds=timeout_seconds) as control:
            yield control


async def _restore(control: QmpConnection, spec: MachineSpec) -> None:
    match spec.restore_from:
        case MemoryStream(path):
            await load_state(control, path, with_memory=True)
        case MemoryImage(_, state):
            await load_state(control, state, with_memory=False)
        case None:
            return
    if spec.network.kind != "none":
        await _set_link(control, up=False)
    await control.execute("cont")


async def _set_link(control: QmpConnection, *, up: bool) -> None:
    """A machine without a network has no such link, which QEMU says in words only."""
    try:
        await control.execute("set_link", {"name": NETWORK_NODE, "up": up})
    except VmmError as error:
        if "not found" not in error.message:
            raise
