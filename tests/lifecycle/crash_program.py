"""A manager that kills itself: run as a program by ``test_crash``, with drivers whose resources are files.

``crash_program.py FOLDER OPERATION before|after`` creates a sandbox and ends by ``os._exit`` at the operation; with the
operation ``destroy`` in front (``destroy:ensure_volume_absent``) it destroys the sandbox it has made, and ends there.
"""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from atelier.db.engine import Database
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.image import Image
from atelier.model.layout import DataLayout, RunLayout
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    BootFiles,
    Disk,
    DiskFile,
    GuestEndpoint,
    MachineSpec,
    NetworkAttachment,
    ProcessIdentity,
    VolumeRequest,
)
from atelier.model.sandbox import SandboxSpec

CRASHED = 77


class FileDrivers:
    """All kinds of drivers in one: each resource is a file in ``folder``, so that it outlives the process."""

    name = "files"

    def __init__(self, folder: Path, crash_at: str = "", moment: str = "") -> None:
        self.folder = folder
        self.crash_at = crash_at
        self.moment = moment

    def _turn(self, operation: str, name: str, *, present: bool) -> None:
        if (operation, "before") == (self.crash_at, self.moment):
            os._exit(CRASHED)
        file = self.folder / name
        if present:
            file.touch()
        else:
            file.unlink(missing_ok=True)
        if (operation, "after") == (self.crash_at, self.moment):
            os._exit(CRASHED)

    async def ensure_boot_files(self, report: Any) -> BootFiles:
        return BootFiles(Path("/k"), Path("/i"), Path("/t"), "6.1", "t")

    async def ensure_image(self, name: str, report: Any, *, refresh: bool = False) -> Image:
        return Image("base-1", name, Path("/b"), 4096, 1, datetime.now(UTC))

    async def ensure_slot(self, sandbox_id: str) -> NetworkAttachment:
        self._turn("ensure_slot", f"slot-{sandbox_id}", present=True)
        return NetworkAttachment("none")

    async def ensure_slot_absent(self, sandbox_id: str) -> None:
        self._turn("ensure_slot_absent", f"slot-{sandbox_id}", present=False)

    async def ensure_volume(self, request: VolumeRequest) -> Disk:
        self._turn("ensure_volume", f"volume-{request.sandbox_id}", present=True)
        return Disk(ROOT_DISK_SERIAL, DiskFile(Path("/v"), "qcow2"), (request.base,))

    async def ensure_volume_absent(self, sandbox_id: str) -> None:
        self._turn("ensure_volume_absent", f"volume-{sandbox_id}", present=False)

    async def ensure_run_directory(self, sandbox_id: str, run_directory: Path) -> None:
        self._turn("ensure_run_directory", f"run-{sandbox_id}", present=True)

    async def ensure_run_directory_absent(self, run_directory: Path) -> None:
        self._turn("ensure_run_directory_absent", f"run-{run_directory.name}", present=False)

    async def ensure_started(self, spec: MachineSpec) -> ProcessIdentity:
        self._turn("ensure_started", f"vmm-{spec.sandbox_id}", present=True)
        return ProcessIdentity(1, 1, spec.sandbox_id)

    async def find_process(self, sandbox_id: str, run_directory: Path) -> ProcessIdentity | None:
        alive = (self.folder / f"vmm-{sandbox_id}").exists()
        return ProcessIdentity(1, 1, sandbox_id) if alive else None

    async def ensure_stopped(self, sandbox_id: str, run_directory: Path, identity: ProcessIdentity | None) -> None:
        self._turn("ensure_stopped", f"vmm-{sandbox_id}", present=False)

    async def wait_ended(self, identity: ProcessIdentity) -> None:
        while (self.folder / f"vmm-{identity.boot_id}").exists():
            await asyncio.sleep(0.2)

    def guest_endpoint(self, run_directory: Path) -> GuestEndpoint:
        return GuestEndpoint("fake", run_directory / "guest.sock")

    async def console_tail(self, run_directory: Path, limit_bytes: int) -> bytes:
        return b""

    async def ensure_channel(self, sandbox_id: str, endpoint: GuestEndpoint, token: str) -> None:
        self._turn("ensure_channel", f"channel-{sandbox_id}", present=True)

    async def ensure_channel_absent(self, sandbox_id: str) -> None:
        self._turn("ensure_channel_absent", f"channel-{sandbox_id}", present=False)

    async def wait_ready(self, sandbox_id: str, timeout_seconds: float) -> None:
        self._turn("wait_ready", f"ready-{sandbox_id}", present=False)

    async def initialize(self, sandbox_id: str, identity: Any) -> None:
        self._turn("initialize", f"identity-{sandbox_id}", present=False)


def make_lifecycle(folder: Path, drivers: FileDrivers) -> tuple[Database, SandboxLifecycle]:
    """Inside a running event loop."""
    data = DataLayout(folder / "data")
    database = Database(data.database)
    database.open()
    lifecycle = SandboxLifecycle(
        database=database,
        vmm=cast(VmmDriver, drivers),
        storage=cast(StorageDriver, drivers),
        network=cast(NetworkDriver, drivers),
        images=cast(ImageDriver, drivers),
        guests=cast(GuestDriver, drivers),
        data=data,
        run=RunLayout(folder / "run"),
        installation_id="abcd",
    )
    return database, lifecycle


async def main(folder: Path, operation: str, moment: str) -> None:
    resources = folder / "resources"
    resources.mkdir(exist_ok=True)
    destroying = operation.startswith("destroy:")
    drivers = FileDrivers(resources, operation.removeprefix("destroy:"), moment)
    _, lifecycle = make_lifecycle(folder, drivers)
    sandbox = await lifecycle.start_create("one", SandboxSpec())
    await lifecycle.wait_settled(sandbox.id, 60)
    if destroying:
        await lifecycle.destroy(sandbox.id)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
