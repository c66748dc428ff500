"""Virtual machines by Firecracker, each in a jail of its own: a chroot, a user, a cgroup.

Used by the lifecycle. What takes root is asked of ``VmmPrivileges``; everything else goes over the machine's API socket,
which that lets the manager through to. A machine is known by its id in the jailer's words, made of installation and
sandbox, and by that alone it is ended. Every jail looks the same from within, so a saved machine goes on in any.

A run directory's name is its sandbox's id (``RunLayout.vmm_directory``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import stat
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

from atelier.drivers.vmm.firecracker_api import FirecrackerApi
from atelier.drivers.vmm.firecracker_config import (
    ROOT_DRIVE,
    BalloonUpdate,
    InstanceActionInfo,
    PartialDrive,
    Vm,
    replacing,
)
from atelier.drivers.vmm.firecracker_launch import (
    MachineChoices,
    boot_requests,
    jail_request,
    jail_start,
    restore_requests,
    start_failure,
    unpacked_state,
    wait_for_api,
)
from atelier.drivers.vmm.firecracker_saving import RunningMachine, bake_image, run_on, save_machine
from atelier.drivers.vmm.firecracker_version import FirecrackerVersion, read_version
from atelier.drivers.vmm.interface import SavingMoment
from atelier.drivers.vmm.privileges import VmmPrivileges
from atelier.drivers.vmm.processor import read_processor
from atelier.drivers.vmm.run_folder import RunFolder, sandboxes_of
from atelier.drivers.vmm.vmm_users import UserRange, all_users_taken, user_candidates
from atelier.host import processes
from atelier.host.files import ensure_folder_absent, ensure_private_folder, read_tail, write_atomically
from atelier.model.errors import CommandError, ConflictError, InvalidRequestError, VmmError
from atelier.model.jail import (
    JAIL_API_SOCKET,
    JAIL_DISK,
    JAIL_GUEST_SOCKET,
    JAIL_LOG,
    JAIL_METRICS,
    JAIL_TOOLS,
    machine_id,
)
from atelier.model.layout import check_socket_path
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    TOOLS_DISK_SERIAL,
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

_START_SECONDS = 30.0
_SAVE_SECONDS = 600.0
"""Of one request: Firecracker writes or reads all of a machine's memory in it."""
_TAIL_BYTES = 1500
_METRICS_TAIL_BYTES = 256 * 1024
_SECTOR_BYTES = 512
_MIB = 1024 * 1024
_FORMAT = 1
"""To be raised with every change of the devices that a machine has, of their order, or of the jail's names."""
_DISKS = {ROOT_DISK_SERIAL: JAIL_DISK, TOOLS_DISK_SERIAL: JAIL_TOOLS}


class FirecrackerVmm:
    """``users``: the ids that machines get, each one of its own; None: that of this process, where it is not root."""

    def __init__(
        self,
        installation_id: str,
        privileges: VmmPrivileges,
        executable: Path,
        *,
        users: UserRange | None,
        choices: MachineChoices | None = None,
    ) -> None:
        self._installation_id = installation_id
        self._privileges = privileges
        self._executable = executable
        self._users = users
        self._choices = choices or MachineChoices()
        self._starting: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._saving: set[Path] = set()
        self._version: tuple[tuple[int, int], FirecrackerVersion] | None = None

    @property
    def name(self) -> str:
        return "firecracker"

    @property
    def opens_network(self) -> bool:
        return True

    async def prepare(self) -> FirecrackerVersion:
        """The version of what is installed, asked for again when that was replaced. Raises MissingProgramError, VmmError."""
        with contextlib.suppress(OSError):
            found = self._executable.stat()
            build = (found.st_ino, found.st_mtime_ns)
            if self._version is None or self._version[0] != build:
                self._version = (build, await read_version(self._executable))
            return self._version[1]
        return await read_version(self._executable)

    def boot_id(self) -> str:
        return processes.boot_id()

    async def list_sandboxes(self, sandboxes_directory: Path) -> list[str]:
        prefix = machine_id(self._installation_id, "")
        names = [jail.machine_id.removeprefix(prefix) for jail in await self._privileges.list_jails()]
        return sandboxes_of(names, sandboxes_directory)

    async def ensure_run_directory(self, sandbox_id: str, run_directory: Path) -> None:
        for name in (JAIL_API_SOCKET, JAIL_GUEST_SOCKET):
            check_socket_path(self._in_jail(run_directory, name))
        ensure_private_folder(run_directory)

    async def ensure_run_directory_absent(self, run_directory: Path) -> None:
        ensure_folder_absent(run_directory)

    # --- start and end ------------------------------------------------------------------------------------------------

    async def ensure_started(self, spec: MachineSpec, network_descriptor: int | None = None) -> ProcessIdentity:
        lock = self._starting.setdefault(spec.sandbox_id, asyncio.Lock())
        async with lock:
            # Its console is made before a VMM is: without one there is nothing to look for.
            if RunFolder(spec.run_directory).console.exists() and (
                running := await self.find_process(spec.sandbox_id, spec.run_directory)
            ):
                if await self._has_come_to_run(spec):
                    return running
                await self._privileges.kill(self._machine(spec.run_directory))
            return await self._start(spec, await self.prepare())

    async def _has_come_to_run(self, spec: MachineSpec) -> bool:
        """Whether whoever began to start or restore it came to the end of that. A restored one that is paused never did:
        it is loaded so."""
        try:
            state = await self._api(spec.run_directory).state()
        except VmmError:
            return False
        return state == "Running" or (state == "Paused" and spec.restore_from is None)

    async def _start(self, spec: MachineSpec, version: FirecrackerVersion) -> ProcessIdentity:
        if not spec.run_directory.is_dir():
            raise VmmError(f"the machine cannot be started: there is no {spec.run_directory}")
        folder, machine = RunFolder(spec.run_directory), self._machine(spec.run_directory)
        try:
            user_id = await self._prepare_jail(spec, machine)
            write_atomically(folder.jailed, json.dumps({"tap": spec.network.device_name}).encode(), durable=False)
            start = jail_start(spec, machine, user_id, folder.console)
            said_before = folder.console.stat().st_size if folder.console.exists() else 0
            try:
                identity = await self._privileges.start(start)
                folder.keep_identity(identity)
                await self._bring_up(spec, version, identity)
            except (VmmError, CommandError) as error:
                said = b""
                # Before the manager was let through to it, the jail is the machine's alone.
                with contextlib.suppress(PermissionError):
                    said = await self.log_tail(spec.run_directory, _TAIL_BYTES)
                said = said or _said_since(folder.console, said_before)
                raise start_failure(spec, error, said.decode(errors="replace").strip()) from error
        except BaseException:
            await asyncio.shield(self.ensure_stopped(spec.sandbox_id, spec.run_directory, None))
            raise
        return identity

    async def _prepare_jail(self, spec: MachineSpec, machine: str) -> int:
        """With a user id that no other machine has; returns it."""
        stream = spec.restore_from.path if isinstance(spec.restore_from, MemoryStream) else None
        try:
            for user_id in user_candidates(self._users, spec.sandbox_id) if self._users else [os.geteuid()]:
                try:
                    await self._privileges.prepare_jail(jail_request(spec, machine, user_id))
                except ConflictError as error:
                    if error.code != "jail_user_taken":
                        raise
                else:
                    return user_id
        finally:
            if stream is not None:
                unpacked_state(stream).unlink(missing_ok=True)
        assert self._users is not None
        raise all_users_taken(self._users)

    async def _bring_up(self, spec: MachineSpec, version: FirecrackerVersion, identity: ProcessIdentity) -> None:
        """Ask for all that the machine is made of, and let it run."""
        machine, run = self._machine(spec.run_directory), spec.run_directory
        api = self._api(run)
        await wait_for_api(api, identity, lambda: self._privileges.grant(machine))
        if spec.restore_from is None:
            for request in boot_requests(spec, self._choices):
                await api.put(request)
            await self._privileges.grant(machine)
            return
        api = self._api(run, _SAVE_SECONDS)
        for request in restore_requests(spec, version):
            await api.put(request)
        await self._privileges.grant(machine)
        # It has the rate that was asked for when its parent was started.
        await api.patch(PartialDrive(ROOT_DRIVE, rate_limiter=replacing(self._choices.disk_rate)))
        await api.patch(Vm("Resumed"))

    async def find_process(self, sandbox_id: str, run_directory: Path) -> ProcessIdentity | None:
        if kept := RunFolder(run_directory).find_identity():
            return kept
        # Nobody wrote down what a manager started that died at that very moment.
        name = machine_id(self._installation_id, sandbox_id)
        return next((jail.process for jail in await self._privileges.list_jails() if jail.machine_id == name), None)

    async def ensure_stopped(self, sandbox_id: str, run_directory: Path, identity: ProcessIdentity | None) -> None:
        # By its id and nothing else: ``identity`` may be of somebody else's by now.
        name = machine_id(self._installation_id, sandbox_id)
        await self._privileges.kill(name)
        await self._privileges.remove_jail(name)

    async def wait_ended(self, identity: ProcessIdentity) -> None:
        await processes.wait_ended(identity)

    async def resident_bytes(self, identities: Sequence[ProcessIdentity]) -> int:
        return await asyncio.to_thread(lambda: sum(map(processes.resident_bytes, identities)))

    # --- a running machine --------------------------------------------------------------------------------------------

    async def resize_disk(self, run_directory: Path, serial: str, size_mib: int) -> None:
        disk = self._disk_of(run_directory, serial)
        present_bytes = _size_bytes(disk)
        if size_mib * _MIB < present_bytes and stat.S_ISREG(disk.stat().st_mode):
            raise InvalidRequestError(
                f"the disk has {present_bytes // _MIB} MiB and cannot shrink to {size_mib} MiB",
                code="disk_cannot_shrink",
                hint="a disk only grows",
            )
        if stat.S_ISREG(disk.stat().st_mode):
            os.truncate(disk, size_mib * _MIB)
        elif present_bytes < size_mib * _MIB:
            raise VmmError(
                f"the volume of the machine in {run_directory} has {present_bytes // _MIB} MiB, not {size_mib} MiB",
                code="volume_not_grown",
                hint="its volume is grown first, then the machine is told",
            )
        # Also at its size: the guest of a restored machine still knows the size that its parent's disk had.
        await self._api(run_directory).patch(PartialDrive(ROOT_DRIVE, f"/{JAIL_DISK}"))

    def guest_endpoint(self, run_directory: Path) -> GuestEndpoint:
        return GuestEndpoint("vsock", self._in_jail(run_directory, JAIL_GUEST_SOCKET))

    async def console_tail(self, run_directory: Path, limit_bytes: int) -> bytes:
        return read_tail(RunFolder(run_directory).console, limit_bytes)

    async def trim_console(self, run_directory: Path, limit_bytes: int) -> None:
        RunFolder(run_directory).trim_console(limit_bytes)

    async def resume_after_full_disk(self, run_directory: Path) -> bool:
        # Firecracker tells its guest that the disk is full, and halts nothing.
        return False

    async def log_tail(self, run_directory: Path, limit_bytes: int) -> bytes:
        """What Firecracker itself said last."""
        return read_tail(self._in_jail(run_directory, JAIL_LOG), limit_bytes)

    async def read_metrics(self, run_directory: Path) -> dict[str, Any]:
        """Firecracker's counters as of now, as its documentation names them. Raises VmmError."""
        await self._api(run_directory).put(InstanceActionInfo("FlushMetrics"))
        written = read_tail(self._in_jail(run_directory, JAIL_METRICS), _METRICS_TAIL_BYTES)
        try:
            # One object a line, and the last one is whole: it was asked for.
            found: object = json.loads(written.splitlines()[-1])
        except (IndexError, ValueError, RecursionError) as error:
            raise VmmError("Firecracker wrote no metrics", code="firecracker_protocol") from error
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}

    async def set_balloon(self, run_directory: Path, amount_mib: int) -> None:
        """Ask the guest for this much of its memory; 0: it may have all of it again."""
        await self._api(run_directory).patch(BalloonUpdate(amount_mib))

    # --- saved machines -----------------------------------------------------------------------------------------------

    async def stamp(self, boot: BootFiles, network_kind: str) -> MachineStamp:
        model, flags = await asyncio.to_thread(read_processor)
        template = self._choices.cpu_template or ("of its own" if self._choices.cpu_config else "none")
        return MachineStamp(
            vmm="firecracker",
            vmm_version=str(await self.prepare()),
            # What it saves of a guest follows the host's kernel, too.
            machine_type=f"cpu template {template}, host kernel {platform.release()}",
            cpu_model=model,
            cpu_flags=flags,
            # It hands the counter's rate over by itself.
            tsc_khz=0,
            network_kind=network_kind,
            format=_FORMAT,
        )

    async def open_link(self, run_directory: Path) -> None:
        folder = RunFolder(run_directory)
        if folder.find_identity() is None:
            raise VmmError(f"no machine runs in {run_directory}")
        try:
            tap = str(json.loads(folder.jailed.read_bytes())["tap"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VmmError(f"{folder.jailed} is missing or damaged", hint="stop the sandbox and start it") from error
        if tap:
            await self._privileges.set_link(self._machine(run_directory), tap, up=True)

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
        self._saving.add(run_directory)
        try:
            machine = RunningMachine(
                self._machine(run_directory), self._api(run_directory, _SAVE_SECONDS), self._privileges
            )
            return await save_machine(machine, target, before_stop=before_stop, at_stop=at_stop, afterwards=afterwards)
        finally:
            self._saving.discard(run_directory)

    async def go_on(self, run_directory: Path) -> None:
        await run_on(self._api(run_directory))

    @asynccontextmanager
    async def disk_switch(self, run_directory: Path, serial: str, top: DiskFile) -> AsyncGenerator[SavingMoment]:
        if not await self.writes_to(run_directory, serial, top):
            raise VmmError(
                f"Firecracker cannot move the machine in {run_directory} over to {top.path}",
                code="disk_cannot_switch",
                hint="its storage has to freeze a copy of the volume: LVM thin",
            )

        async def nothing() -> None:
            """It writes there already."""

        yield nothing

    async def writes_to(self, run_directory: Path, serial: str, file: DiskFile) -> bool:
        used = self._disk_of(run_directory, serial).stat()
        try:
            asked = file.path.stat()
        except FileNotFoundError:
            return False
        if stat.S_ISBLK(used.st_mode):
            return stat.S_ISBLK(asked.st_mode) and used.st_rdev == asked.st_rdev
        return (used.st_dev, used.st_ino) == (asked.st_dev, asked.st_ino)

    async def bake(self, stream: MemoryStream, stamp: MachineStamp, spec: MachineSpec, image: MemoryImage) -> None:
        await bake_image(stream, image, spec.memory_mib * _MIB)

    # --- places -------------------------------------------------------------------------------------------------------

    def _machine(self, run_directory: Path) -> str:
        return machine_id(self._installation_id, run_directory.name)

    def _in_jail(self, run_directory: Path, name: str) -> Path:
        return self._privileges.places.file(self._machine(run_directory), name)

    def _api(self, run_directory: Path, timeout_seconds: float = _START_SECONDS) -> FirecrackerApi:
        return FirecrackerApi(self._in_jail(run_directory, JAIL_API_SOCKET), timeout_seconds=timeout_seconds)

    def _disk_of(self, run_directory: Path, serial: str) -> Path:
        """The running machine's, in its jail."""
        if RunFolder(run_directory).find_identity() is None:
            raise VmmError(f"no machine runs in {run_directory}")
        if serial not in _DISKS:
            raise VmmError(f"the machine in {run_directory} has no disk {serial}")
        return self._in_jail(run_directory, _DISKS[serial])


def _said_since(console: Path, before_bytes: int) -> bytes:
    new_bytes = console.stat().st_size - before_bytes if console.exists() else 0
    return read_tail(console, min(new_bytes, _TAIL_BYTES)) if new_bytes > 0 else b""


def _size_bytes(disk: Path) -> int:
    found = disk.stat()
    if not stat.S_ISBLK(found.st_mode):
        return found.st_size
    # Its node is the machine's to open; the kernel tells everybody. Source: Linux Documentation/ABI/stable/sysfs-block.
    sectors = Path(f"/sys/dev/block/{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}/size").read_text()
    return int(sectors) * _SECTOR_BYTES
