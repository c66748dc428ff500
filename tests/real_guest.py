"""A real guest of the base image with its guest driver, gateway and VMM, but without a manager: who tests what is said to
guests says it himself."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.real_machines import emulated, get_base_image, get_boot_files, make_overlay

from atelier.drivers.guest.agent import AgentGuests
from atelier.model.guest import ProcessEnded, ProcessEvent, ProcessOutput, ProcessSpec
from atelier.model.layout import RunLayout
from atelier.model.machine import (
    TOOLS_DISK_SERIAL,
    Disk,
    DiskFile,
    GuestEndpoint,
    MachineSpec,
    NetworkAttachment,
    ProcessIdentity,
)

INSTALLATION = "rlgs"
SANDBOX = "quiesceguest"
BOOT_SECONDS = 180.0
CALL_SECONDS = 120.0


@dataclass
class RealGuest:
    """``root`` is the file of its disk, ``folder`` where that lies; ``token`` the one that its channel was opened with."""

    driver: AgentGuests
    endpoint: GuestEndpoint
    root: DiskFile
    folder: Path
    token: str

    async def run(self, script: str, user: str = "root") -> str:
        """What the script (of sh) writes; it must end with 0."""
        spec = ProcessSpec(("sh", "-c", script), user=user, timeout_seconds=CALL_SECONDS)
        async with asyncio.timeout(CALL_SECONDS), self.driver.start_process(SANDBOX, spec) as events:
            return self._output([event async for event in events], script)

    @staticmethod
    def _output(got: list[ProcessEvent], script: str) -> str:
        written = b"".join(event.data for event in got if isinstance(event, ProcessOutput)).decode(errors="replace")
        assert isinstance(got[-1], ProcessEnded)
        assert got[-1].exit_code == 0, f"{script}: {got[-1]}: {written}"
        return written


@asynccontextmanager
async def real_guest(token: str = "first token") -> AsyncIterator[RealGuest]:
    """A guest that answers, and has not been told who it is."""
    # Short: sockets lie below it.
    folder = Path(tempfile.mkdtemp(prefix="atl-gst-"))
    folder.chmod(0o711)
    layout = RunLayout(folder / "run")
    layout.root.mkdir(0o711)
    layout.sandboxes.mkdir(0o711)
    image, boot = await get_base_image(), await get_boot_files()
    vmm = emulated(INSTALLATION, folder)
    spec = MachineSpec(
        sandbox_id=SANDBOX,
        installation_id=INSTALLATION,
        vcpu_count=1,
        memory_mib=256,
        boot=boot,
        root=make_overlay(folder / "root.qcow2", DiskFile(image.path, "raw")),
        tools=Disk(TOOLS_DISK_SERIAL, DiskFile(boot.tools, "raw"), read_only=True),
        network=NetworkAttachment("user_restricted", "02:00:00:00:00:01"),
        run_directory=layout.vmm_directory(SANDBOX),
    )
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "atelier.gateway", "--run-dir", str(layout.root)
    )
    driver = AgentGuests(layout.channel_socket, layout.gateway_socket)
    process: ProcessIdentity | None = None
    try:
        await vmm.ensure_run_directory(SANDBOX, spec.run_directory)
        process = await vmm.ensure_started(spec)
        async with asyncio.timeout(BOOT_SECONDS):
            while not layout.gateway_socket.exists():
                await asyncio.sleep(0.02)
        endpoint = vmm.guest_endpoint(spec.run_directory)
        await driver.ensure_channel(SANDBOX, endpoint, token)
        try:
            await driver.wait_ready(SANDBOX, BOOT_SECONDS)
            yield RealGuest(driver, endpoint, spec.root.top, folder, token)
        except BaseException:
            print((await vmm.console_tail(spec.run_directory, 65536)).decode(errors="replace"))
            raise
    finally:
        await driver.close()
        gateway.send_signal(signal.SIGTERM)
        await gateway.wait()
        await vmm.ensure_stopped(SANDBOX, spec.run_directory, process)
        await vmm.ensure_run_directory_absent(spec.run_directory)
        shutil.rmtree(folder)
