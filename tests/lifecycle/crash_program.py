"""A manager that kills itself: run by ``test_crash`` in a process of its own, with drivers whose resources are files."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from tests.lifecycle.sabotage import Place, bring_about, disturb, last_that_unwinds

from atelier.db.engine import Database
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle import sandbox_create
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import ConflictError, HostError, NotFoundError
from atelier.model.guest import ProcessEnded, ProcessSpec, ProcessStarted
from atelier.model.image import Image
from atelier.model.layout import DataLayout, RunLayout
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    BootFiles,
    Disk,
    DiskFile,
    GuestEndpoint,
    MachineSpec,
    MachineStamp,
    NetworkAttachment,
    ProcessIdentity,
    SavedMachine,
    VolumeRequest,
)
from atelier.model.network_policy import NetworkPolicy

CRASHED = 77
LOG = "crash.log"


class FileDrivers:
    """All kinds of drivers in one: each resource is a file in ``folder``, so that it outlives the process."""

    name = "files"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _set(self, name: str, *, present: bool) -> None:
        file = self.folder / name
        if present:
            file.touch()
        else:
            file.unlink(missing_ok=True)

    def _ids(self, resource: str) -> list[str]:
        return [file.name.partition("-")[2] for file in self.folder.glob(f"{resource}-*")]

    def boot_id(self) -> str:
        return "the one boot"

    async def ensure_boot_files(self, report: Any) -> BootFiles:
        tools = self.folder.parent / "tools"
        tools.touch()
        return BootFiles(Path("/k"), Path("/i"), tools, "6.1", "t")

    async def ensure_image(self, name: str, report: Any, *, refresh: bool = False) -> Image:
        return await self.find_image(name)

    async def find_image(self, name: str) -> Image:
        return Image("base-1", name, Path("/b"), 1024, 1, datetime.now(UTC))

    slot_count: int | None = None

    attachment_kind = "none"

    opens_network = False

    grows_open_volumes = False

    enforces_policies = True

    async def ensure_slot(self, sandbox_id: str, lease: int, policy: NetworkPolicy) -> NetworkAttachment:
        self._set(f"slot-{sandbox_id}", present=True)
        return NetworkAttachment("none")

    async def set_policy(self, sandbox_id: str, policy: NetworkPolicy) -> None:
        if not (self.folder / f"slot-{sandbox_id}").exists():
            raise NotFoundError(f"sandbox {sandbox_id} has no network slot", code="no_network_slot")

    async def ensure_slot_absent(self, sandbox_id: str) -> None:
        self._set(f"slot-{sandbox_id}", present=False)

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        self._set(f"volume-{request.sandbox_id}", present=True)
        return Disk(ROOT_DISK_SERIAL, DiskFile(Path("/v"), "qcow2"), (request.base,))

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        self._set(f"volume-{sandbox_id}", present=False)

    async def ensure_run_directory(self, sandbox_id: str, run_directory: Path) -> None:
        self._set(f"run-{sandbox_id}", present=True)

    async def ensure_run_directory_absent(self, run_directory: Path) -> None:
        self._set(f"run-{run_directory.name}", present=False)

    @asynccontextmanager
    async def opened(self, sandbox_id: str) -> AsyncGenerator[int | None]:
        if (self.folder / f"vmm-{sandbox_id}").exists():
            raise ConflictError(f"the TAP of {sandbox_id} is held open by another machine", code="slot_in_use")
        yield None

    async def ensure_started(self, spec: MachineSpec, network_descriptor: int | None = None) -> ProcessIdentity:
        self._set(f"vmm-{spec.sandbox_id}", present=True)
        return ProcessIdentity(1, _number(spec.sandbox_id), self.boot_id())

    async def stamp(self, boot: BootFiles, network_kind: str) -> MachineStamp:
        return MachineStamp("file", "1", "none", "none", "", 0, network_kind, 1)

    async def save(self, run_directory: Path, target: Path, **moments: Any) -> SavedMachine:
        assert (self.folder / f"vmm-{run_directory.name}").exists()
        target.write_bytes(b"memory")
        return SavedMachine(stopped_ms=1.0, size_bytes=6, vmm_version="1")

    async def go_on(self, run_directory: Path) -> None:
        assert (self.folder / f"vmm-{run_directory.name}").exists()

    async def open_link(self, run_directory: Path) -> None:
        assert (self.folder / f"vmm-{run_directory.name}").exists()

    async def quiesce(self, sandbox_id: str) -> None:
        assert (self.folder / f"vmm-{sandbox_id}").exists()

    async def thaw(self, sandbox_id: str) -> None:
        assert (self.folder / f"vmm-{sandbox_id}").exists()

    async def find_process(self, sandbox_id: str, run_directory: Path) -> ProcessIdentity | None:
        alive = (self.folder / f"vmm-{sandbox_id}").exists()
        return ProcessIdentity(1, _number(sandbox_id), self.boot_id()) if alive else None

    async def ensure_stopped(self, sandbox_id: str, run_directory: Path, identity: ProcessIdentity | None) -> None:
        self._set(f"vmm-{sandbox_id}", present=False)

    async def wait_ended(self, identity: ProcessIdentity) -> None:
        while identity.start_time_ticks in map(_number, self._ids("vmm")):
            await asyncio.sleep(0.02)

    def guest_endpoint(self, run_directory: Path) -> GuestEndpoint:
        return GuestEndpoint("fake", run_directory / "guest.sock")

    async def console_tail(self, run_directory: Path, limit_bytes: int) -> bytes:
        return b""

    async def ensure_channel(self, sandbox_id: str, endpoint: GuestEndpoint, token: str) -> None:
        self._set(f"channel-{sandbox_id}", present=True)

    async def ensure_channel_absent(self, sandbox_id: str) -> None:
        self._set(f"channel-{sandbox_id}", present=False)

    async def wait_ready(self, sandbox_id: str, timeout_seconds: float) -> None:
        assert (self.folder / f"vmm-{sandbox_id}").exists()

    async def initialize(self, sandbox_id: str, identity: Any) -> None:
        assert (self.folder / f"vmm-{sandbox_id}").exists()

    async def rename(self, sandbox_id: str, hostname: str, environment: dict[str, str]) -> None:
        assert (self.folder / f"vmm-{sandbox_id}").exists()

    async def shut_down(self, sandbox_id: str) -> None:
        self._set(f"vmm-{sandbox_id}", present=False)

    async def find_volume(self, sandbox_id: str) -> Disk | None:
        volume = self.folder / f"volume-{sandbox_id}"
        return Disk(ROOT_DISK_SERIAL, DiskFile(volume, "qcow2")) if volume.exists() else None

    async def grow_volume(self, sandbox_id: str, size_mib: int) -> None:
        assert (self.folder / f"volume-{sandbox_id}").exists()

    async def resize_disk(self, run_directory: Path, serial: str, size_mib: int) -> None:
        assert (self.folder / f"vmm-{run_directory.name}").exists()

    @asynccontextmanager
    async def start_process(self, sandbox_id: str, spec: ProcessSpec) -> AsyncGenerator[AsyncIterator[Any]]:
        assert (self.folder / f"vmm-{sandbox_id}").exists()

        async def events() -> AsyncIterator[Any]:
            yield ProcessStarted(7)
            yield ProcessEnded(0, "exit status 0")

        yield events()

    async def list_sandboxes(self, sandboxes_directory: Path) -> list[str]:
        return sorted({*self._ids("vmm"), *self._ids("run")})

    async def list_volumes(self) -> list[str]:
        return self._ids("volume")

    async def list_snapshot_disks(self) -> list[str]:
        """It takes no snapshots."""
        return []

    async def list_slots(self) -> list[str]:
        return self._ids("slot")

    async def list_channels(self) -> list[str]:
        return self._ids("channel")

    async def used_bytes(self, sandbox_id: str) -> int:
        return 1


def _number(sandbox_id: str) -> int:
    return zlib.crc32(sandbox_id.encode())


def make_lifecycle(
    folder: Path, drivers: FileDrivers, *, opened: bool = True, network: NetworkDriver | None = None
) -> tuple[Database, SandboxLifecycle]:
    """Inside a running event loop. ``network``: another than theirs."""
    data = DataLayout(folder / "data")
    database = Database(data.database)
    if opened:
        database.open()
    lifecycle = SandboxLifecycle(
        database=database,
        vmm=cast(VmmDriver, drivers),
        storage=cast(StorageDriver, drivers),
        network=network or cast(NetworkDriver, drivers),
        images=cast(ImageDriver, drivers),
        guests=cast(GuestDriver, drivers),
        data=data,
        run=RunLayout(folder / "run"),
        installation_id="abcd",
    )
    return database, lifecycle


def run(folder: Path, kind: str, place: str) -> None:
    """Bring the saga of this kind about and end by ``os._exit`` at the place; for a place in an undo the saga's last
    step fails. Kind ``destroy``: the sandbox is created, then destroyed. What it says goes to ``folder``'s LOG."""
    with (folder / LOG).open("wb") as log:
        os.dup2(log.fileno(), 2)
    asyncio.run(_run(folder, kind, Place.parse(place)))


async def _run(folder: Path, kind: str, place: Place) -> None:
    resources = folder / "resources"
    resources.mkdir(exist_ok=True)
    _, lifecycle = make_lifecycle(folder, FileDrivers(resources))
    destroying = kind == "destroy"
    if destroying:
        kind = sandbox_create.KIND
    last = last_that_unwinds(next(saga for saga in lifecycle.sagas if saga.kind == kind))

    async def crash(reached: Place) -> None:
        if reached == place:
            os._exit(CRASHED)
        if place.call == "undo" and not destroying and reached == Place(kind, last, "do", "after"):
            raise HostError("so that it is unwound")

    disturb(lifecycle, crash)
    sandbox_id = await bring_about(lifecycle, kind)
    await lifecycle.wait_settled(sandbox_id, 60)
    if destroying:
        await lifecycle.destroy(sandbox_id)
