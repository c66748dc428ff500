"""A host of fakes that outlives the lifecycle put on top of it, as a machine outlives its manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from atelier.db.engine import Database
from atelier.db.outbox import Outbox, OutboxEvent
from atelier.db.sagas import SagaStore
from atelier.db.sandboxes import SandboxRepository
from atelier.drivers.faults import Faults
from atelier.drivers.guest.fake import FakeGuests
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.fake import FakeNetwork
from atelier.drivers.storage.fake import FakeStorage
from atelier.drivers.vmm.fake import FakeVmm
from atelier.lifecycle.composition import LifecycleLimits
from atelier.lifecycle.fleet import SandboxFleet
from atelier.lifecycle.sandbox_create import create_saga_id
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.guest import ProcessEnded, ProcessOutput, ProcessSpec, ProcessStarted
from atelier.model.image import BuildProgress, Image
from atelier.model.layout import DataLayout, RunLayout
from atelier.model.machine import BootFiles, GuestEndpoint
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.saga.log import SagaRecord
from atelier.saga.retry import RetryPolicies, RetryPolicy

FAST = RetryPolicies(RetryPolicy(3, 0.001, 0.001), RetryPolicy(3, 0.001, 0.001), RetryPolicy(4, 0.001, 0.001))


class RecordingFaults(Faults):
    """Also writes down what was called, in ``calls`` shared by all drivers of a host."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls
        self.reached: dict[str, asyncio.Event] = {}

    async def before(self, operation: str) -> None:
        self._calls.append(operation)
        if event := self.reached.get(operation):
            event.set()
        await super().before(operation)


class StubImages:
    """Built images only, but reports progress as a build would."""

    name = "stub"

    def __init__(self, faults: Faults, folder: Path) -> None:
        self.faults = faults
        self.folder = folder
        self.size_mib = 1024
        self.build = "0123456789abcdef"

    async def ensure_boot_files(self, report: Callable[[BuildProgress], None]) -> BootFiles:
        await self.faults.before("ensure_boot_files")
        report(BuildProgress("kernel", "unpacked", 1.0))
        (self.folder / "tools").touch()
        return BootFiles(self.folder / "vmlinuz", self.folder / "initramfs", self.folder / "tools", "6.1", "tools-1")

    async def ensure_image(self, name: str, report: Callable[[BuildProgress], None], *, refresh: bool = False) -> Image:
        await self.faults.before("ensure_image")

        def tell() -> None:  # builders report from threads of theirs, and often
            for number in range(1000):
                report(BuildProgress("image", f"package {number}", number / 1000))

        await asyncio.to_thread(tell)
        return await self.find_image(name)

    async def list_images(self) -> list[Image]:
        return [await self.find_image(name) for name in ("base", "other")]

    async def find_image(self, name: str) -> Image:
        return Image(f"{name}-{self.build}", name, self.folder / f"{name}.ext4", self.size_mib, 1, datetime.now(UTC))


class Guests(FakeGuests):
    """Fake guests that also know resize2fs, which ends as it is told to, and remember what they were asked."""

    def __init__(self, faults: Faults) -> None:
        super().__init__(faults)
        self.channels: dict[str, tuple[GuestEndpoint, str]] = {}
        self.processes: list[ProcessSpec] = []
        self.exit_code = 0
        self.output = b""

    async def ensure_channel(self, sandbox_id: str, endpoint: GuestEndpoint, token: str) -> None:
        await super().ensure_channel(sandbox_id, endpoint, token)
        self.channels[sandbox_id] = (endpoint, token)

    async def ensure_channel_absent(self, sandbox_id: str) -> None:
        await super().ensure_channel_absent(sandbox_id)
        self.channels.pop(sandbox_id, None)

    @asynccontextmanager
    async def start_process(self, sandbox_id: str, spec: ProcessSpec) -> AsyncGenerator[AsyncIterator[Any], None]:
        await self.faults.before("start_process")
        self.processes.append(spec)

        async def events() -> AsyncIterator[Any]:
            yield ProcessStarted(7)
            yield ProcessOutput("stderr", self.output)
            yield ProcessEnded(self.exit_code, f"exit status {self.exit_code}")

        yield events()


@dataclass
class Host:
    """``lifecycle()`` is a new manager on this host; the one before is gone or closed."""

    folder: Path
    calls: list[str] = field(default_factory=list)
    limits: LifecycleLimits = field(default_factory=LifecycleLimits)

    def __post_init__(self) -> None:
        self.faults = RecordingFaults(self.calls)
        self.storage = FakeStorage(self.faults)
        self.network = FakeNetwork(self.faults)
        self.images = StubImages(self.faults, self.folder)
        self.guests = Guests(self.faults)
        self.vmm = FakeVmm(self.faults, guest_memory=self.guests)
        self.guests.on_shut_down = self.vmm.end_machine
        self.data = DataLayout(self.folder / "data")
        self.run = RunLayout(self.folder / "run")
        self.database = Database(self.data.database)
        self.lifecycles: list[SandboxLifecycle] = []

    def lifecycle(self, **changes: Any) -> SandboxLifecycle:
        made = SandboxLifecycle(
            database=self.database,
            vmm=self.vmm,
            storage=self.storage,
            network=self.network,
            images=cast(ImageDriver, self.images),
            guests=self.guests,
            data=self.data,
            run=self.run,
            installation_id="abcd",
            limits=self.limits,
            policies=FAST,
            **changes,
        )
        self.lifecycles.append(made)
        return made

    def reboot(self) -> None:
        """All that does not lie on a disk is gone; the slots' leases do."""
        self.vmm.reboot()
        self.guests.channels.clear()

    def fleet(self, lifecycle: SandboxLifecycle) -> SandboxFleet:
        return SandboxFleet(lifecycle, self.database, self.vmm, self.guests, self.run)

    def row(self, sandbox_id: str) -> Sandbox | None:
        with self.database.read() as connection:
            return SandboxRepository().find(connection, sandbox_id)

    def saga(self, sandbox_id: str) -> SagaRecord | None:
        return SagaStore(self.database).find(create_saga_id(sandbox_id))

    def events(self) -> list[OutboxEvent]:
        with self.database.read() as connection:
            return Outbox(self.database).read_after(connection, 0, 1000)

    def states(self) -> list[str]:
        """The story that the events tell, progress left out."""
        words = {"sandbox.state_changed": lambda event: event.payload["state"]}
        told = [event for event in self.events() if event.kind != "sandbox.progress"]
        return [words.get(event.kind, lambda event: event.kind)(event) for event in told]

    def held(self) -> list[str]:
        """Everything that sandboxes hold on this host, the kept consoles included."""
        consoles = self.data.consoles.glob("*") if self.data.consoles.exists() else ()
        memories = self.data.paused.glob("*") if self.data.paused.exists() else ()
        return [
            *(f"vmm {each}" for each in self.vmm.running),
            *(f"run directory {each.name}" for each in self.vmm.run_directories),
            *(f"volume {each}" for each in self.storage.volumes),
            *(f"slot {each}" for each in self.network.slots),
            *(f"channel {each}" for each in self.guests.channels),
            *(f"{each.suffix.removeprefix('.')} {each.stem}" for each in memories),
            *(f"console {each.name}" for each in consoles),
        ]

    def held_by(self, sandbox_id: str) -> set[str]:
        """The kinds of resources that one sandbox holds, consoles aside, and the tools image of one that was paused."""
        words = [each.rpartition(" ") for each in self.held_without_consoles()]
        kinds = {kind for kind, _, owner in words if owner == sandbox_id and kind != "tools"}
        return {"run" if kind == "run directory" else kind for kind in kinds}

    def held_without_consoles(self) -> list[str]:
        return [each for each in self.held() if not each.startswith("console")]

    async def reach(self, operation: str) -> None:
        """Make ``operation`` hang from now on and return once somebody is in it (call before, await after)."""
        await self.faults.reached[operation].wait()

    def hang(self, operation: str) -> None:
        self.faults.hang(operation)
        self.faults.reached[operation] = asyncio.Event()

    async def begun(self, lifecycle: SandboxLifecycle, name: str = "one", **spec: Any) -> Sandbox:
        return await lifecycle.start_create(name, SandboxSpec(**spec))

    async def created(self, lifecycle: SandboxLifecycle, name: str = "one", **spec: Any) -> Sandbox:
        sandbox = await self.begun(lifecycle, name, **spec)
        settled = await lifecycle.wait_settled(sandbox.id, 20)
        assert settled is not None
        return settled


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made = Host(tmp_path)
    made.database.open()
    yield made
    for lifecycle in made.lifecycles:
        await lifecycle.close()
    made.database.close()
