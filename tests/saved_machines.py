"""A machine that is there to be saved, under the real driver and under the fake. The real one has a guest that counts, in
its memory and on its disk, and says what it finds there.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tests.firecracker_machines import FirecrackerStand, tapped
from tests.real_machines import INIT_PREPARES, emulated, get_boot_files, machine_spec, make_overlay, with_init

from atelier.drivers.network.user import UserNetwork
from atelier.drivers.vmm.fake import FakeVmm
from atelier.drivers.vmm.interface import VmmDriver
from atelier.host import processes
from atelier.host.unconnected_tap import unconnected_tap
from atelier.model.errors import CommandError
from atelier.model.ids import new_installation_id
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    BootFiles,
    Disk,
    DiskFile,
    MachineSpec,
    MemoryImage,
    MemoryStream,
    NetworkAttachment,
)

PARENT, CLONE, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"
INSTALLATION = new_installation_id()
"""Of this run alone: another one beside it would end these machines as its own."""
PATIENCE_SECONDS = 120
COUNTS = (
    INIT_PREPARES
    + """
for block in /sys/block/vd*; do
    read -r serial <$block/serial
    [ "$serial" = atelier-root ] && root=/dev/${block##*/}
done
mkdir -p /kept
mount -t tmpfs kept /kept
dd if=/dev/urandom of=/kept/random bs=1M count=1 2>/dev/null
sum=$(md5sum </kept/random)
ip link set eth0 up
count=0
while true; do
    count=$((count + 1))
    was=$(dd if=$root bs=8 skip=1000 count=1 iflag=direct 2>/dev/null)
    printf %8s $count | dd of=$root bs=8 seek=1000 conv=notrunc,fsync 2>/dev/null
    memory=whole
    [ "$(md5sum </kept/random)" = "$sum" ] || memory=BROKEN
    link=$(cat /sys/class/net/eth0/carrier)
    echo "COUNT $count disk $((was)) of $(cat /sys/block/${root#/dev/}/size) memory $memory link $link"
    sleep 0.2
done
"""
)
SIGN = re.compile(r"COUNT (\d+) disk (\d+) of (\d+) memory (\w+) link (\d)\r?\n")
"""Count, what the disk held of it before, the disk's size in sectors, whether memory is what it was, link."""


@asynccontextmanager
async def card_for(spec: MachineSpec) -> AsyncIterator[int | None]:
    if spec.network.kind != "tap":
        yield None
        return
    async with unconnected_tap() as descriptor:
        yield descriptor


async def best_network() -> NetworkAttachment:
    """A TAP, whose card can do more than any other, where one can be made here."""
    try:
        async with unconnected_tap():
            return NetworkAttachment("tap", "02:00:00:00:00:01")
    except CommandError:
        return await UserNetwork().ensure_slot(PARENT, 0)


async def nothing() -> None:
    """So that a machine runs on after it was saved."""


class Stage(ABC):
    """A driver with one running machine, which lasts for all tests; each leaves it running, its link open."""

    vmm: VmmDriver
    parent: MachineSpec
    layers: list[DiskFile]
    """What the parent's disk consists of, the file that it writes to first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sandboxes = [PARENT]

    @abstractmethod
    async def life(self, sandbox_id: str) -> tuple[int, bool]:
        """A new sign of life of that guest: (its count, whether its link is up). Raises TimeoutError."""

    @abstractmethod
    async def end(self, sandbox_id: str) -> None:
        """Let its VMM die without the driver."""

    @abstractmethod
    def overlay(self, name: str) -> Disk:
        """A new disk over what the parent's consists of."""

    def restored(self, sandbox_id: str, source: MemoryStream | MemoryImage) -> MachineSpec:
        self.sandboxes.append(sandbox_id)
        return replace(
            self.parent,
            sandbox_id=sandbox_id,
            root=self.overlay(f"{sandbox_id}-root"),
            run_directory=self.folder / sandbox_id,
            restore_from=source,
        )

    async def start(self, spec: MachineSpec) -> None:
        await self.vmm.ensure_run_directory(spec.sandbox_id, spec.run_directory)
        async with card_for(spec) as descriptor:
            await self.vmm.ensure_started(spec, descriptor)

    @abstractmethod
    async def begin(self) -> None:
        """Start the parent, and wait for its first sign of life."""

    async def stop(self, sandbox_id: str) -> None:
        await self.vmm.ensure_stopped(sandbox_id, self.folder / sandbox_id, None)
        await self.vmm.ensure_run_directory_absent(self.folder / sandbox_id)

    async def bake(self, stream: MemoryStream, spec: MachineSpec, image: MemoryImage) -> None:
        await self.vmm.bake(stream, await self.vmm.stamp(spec.boot, spec.network.kind), spec, image)

    async def saved(self, name: str) -> MemoryStream:
        """The parent as it is now, over disk files that it writes to no more."""
        top = self.overlay(f"{name}-next").top

        run = self.parent.run_directory
        async with self.vmm.disk_switch(run, ROOT_DISK_SERIAL, top) as switch:
            await self.vmm.save(run, self.folder / name, at_stop=switch, afterwards=nothing)
        self.frozen = list(self.layers)
        self.layers.insert(0, top)
        return MemoryStream(self.folder / name)


class CountingStage(Stage):
    """Its guests say what they count on their consoles."""

    async def life(self, sandbox_id: str) -> tuple[int, bool]:
        seen = await self.signs(sandbox_id)
        async with asyncio.timeout(PATIENCE_SECONDS):
            # The second of two new ones: the first may have been under way.
            while len(signs := await self.signs(sandbox_id)) < len(seen) + 2:
                await asyncio.sleep(0.05)
        assert all(memory == "whole" for _, _, _, memory, _ in signs), signs
        assert all(int(disk) + 1 == int(count) for count, disk, *_ in signs if count != "1"), signs
        return int(signs[-1][0]), signs[-1][4] == "1"

    async def signs(self, sandbox_id: str) -> list[tuple[str, str, str, str, str]]:
        """As ``SIGN`` says, all that are on the console."""
        console = (await self.vmm.console_tail(self.folder / sandbox_id, 1_000_000)).decode(errors="replace")
        return SIGN.findall(console)

    async def end(self, sandbox_id: str) -> None:
        identity = await self.vmm.find_process(sandbox_id, self.folder / sandbox_id)
        assert identity is not None
        await processes.kill_and_wait(identity)


class QemuStage(CountingStage):
    """``boot``: files that this user can read; those of the cache by default."""

    def __init__(self, folder: Path, boot: BootFiles | None = None) -> None:
        super().__init__(folder)
        self._boot = boot
        self.vmm = emulated(INSTALLATION, folder)

    async def begin(self) -> None:
        boot = with_init(self._boot or await get_boot_files(), COUNTS, self.folder)
        self.parent = machine_spec(PARENT, INSTALLATION, boot, self.folder, network=await best_network())
        self.layers = [self.parent.root.top, *self.parent.root.backing]
        self.frozen = list(self.layers)
        await self.start(self.parent)
        await self.life(PARENT)

    def overlay(self, name: str) -> Disk:
        below = self.layers if name.endswith("-next") else self.frozen
        return replace(make_overlay(self.folder / f"{name}.qcow2", below[0]), backing=tuple(below))


class FirecrackerStage(CountingStage):
    """Over the fake Firecracker, whose guest counts as the real one's does. There are no overlays: its disk is copied
    while it stands still, as LVM freezes one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stand = FirecrackerStand(folder, INSTALLATION)
        self.vmm = self.stand.vmm

    async def begin(self) -> None:
        self.parent = tapped(self.stand.spec(PARENT), f"at{INSTALLATION}aaaa")
        self.layers = [self.parent.root.top]
        await self.start(self.parent)
        await self.life(PARENT)

    async def start(self, spec: MachineSpec) -> None:
        await self.stand.started(spec)

    def restored(self, sandbox_id: str, source: MemoryStream | MemoryImage) -> MachineSpec:
        return tapped(super().restored(sandbox_id, source), f"at{INSTALLATION}{sandbox_id[:4]}")

    def overlay(self, name: str) -> Disk:
        return self.stand.disk(name, of=self._frozen)

    async def stop(self, sandbox_id: str) -> None:
        await super().stop(sandbox_id)
        assert self.stand.breaches() == []

    async def saved(self, name: str) -> MemoryStream:
        self._frozen = self.folder / f"{name}.frozen"

        async def freeze() -> None:
            await asyncio.to_thread(shutil.copyfile, self.parent.root.top.path, self._frozen)

        await self.vmm.save(self.parent.run_directory, self.folder / name, at_stop=freeze, afterwards=nothing)
        return MemoryStream(self.folder / name)


class CountingGuests:
    """The memory of fake guests: how often each was dumped."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {PARENT: 1}

    def dump(self, sandbox_id: str) -> bytes:
        return str(self.counts[sandbox_id]).encode()

    def load(self, sandbox_id: str, data: bytes) -> None:
        self.counts[sandbox_id] = int(data)


class FakeStage(Stage):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.guests = CountingGuests()
        self.fake = self.vmm = FakeVmm(guest_memory=self.guests)

    async def begin(self) -> None:
        boot = BootFiles(Path("/x"), Path("/x"), Path("/x"), "", "")
        self.layers = [DiskFile(self.folder / "root", "qcow2")]
        disk = Disk(ROOT_DISK_SERIAL, self.layers[0])
        network = NetworkAttachment("user_restricted")
        self.parent = MachineSpec(PARENT, INSTALLATION, 1, 128, boot, disk, disk, network, self.folder / PARENT)
        await self.start(self.parent)

    async def life(self, sandbox_id: str) -> tuple[int, bool]:
        if self.fake.is_stopped(sandbox_id):
            raise TimeoutError
        self.guests.counts[sandbox_id] += 1
        return self.guests.counts[sandbox_id], self.fake.is_link_open(sandbox_id)

    async def end(self, sandbox_id: str) -> None:
        self.fake.end_machine(sandbox_id)

    def overlay(self, name: str) -> Disk:
        return Disk(ROOT_DISK_SERIAL, DiskFile(self.folder / f"{name}.qcow2", "qcow2"), tuple(self.layers))


_StageT = TypeVar("_StageT", bound=Stage)


@contextmanager
def running(kind: Callable[[Path], _StageT]) -> Iterator[_StageT]:
    # Not pytest's folder: its path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="atelier-save-"))
    made = kind(folder)

    async def end() -> None:
        for sandbox_id in set(made.sandboxes):
            await made.stop(sandbox_id)

    try:
        asyncio.run(made.begin())
        yield made
    finally:
        asyncio.run(end())
        shutil.rmtree(folder)
