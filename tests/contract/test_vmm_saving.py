"""What every VMM driver keeps to when it saves a machine and lets it go on elsewhere. The real one has a guest that
counts, in its memory and on its disk, and says what it finds there.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.real_machines import INIT_PREPARES, NO_QEMU, emulated, get_boot_files, machine_spec, make_overlay, with_init

from atelier.drivers.network.user import UserNetwork
from atelier.drivers.vmm.fake import FakeVmm
from atelier.drivers.vmm.interface import VmmDriver
from atelier.host import processes
from atelier.host.unconnected_tap import unconnected_tap
from atelier.model.errors import CommandError, ConflictError, HostError, VmmError
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    BootFiles,
    Disk,
    DiskFile,
    MachineSpec,
    MachineStamp,
    MemoryImage,
    MemoryStream,
    NetworkAttachment,
)

PARENT, CLONE, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"
INSTALLATION = "save"
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
dd if=/dev/urandom of=/kept/random bs=1M count=8 2>/dev/null
sum=$(md5sum </kept/random)
ip link set eth0 up
count=0
while true; do
    count=$((count + 1))
    was=$(dd if=$root bs=8 skip=1000 count=1 iflag=direct 2>/dev/null)
    printf %8s $count | dd of=$root bs=8 seek=1000 conv=notrunc,fsync 2>/dev/null
    memory=whole
    [ "$(md5sum </kept/random)" = "$sum" ] || memory=BROKEN
    echo "COUNT $count disk $((was)) memory $memory link $(cat /sys/class/net/eth0/carrier)"
    sleep 0.1
done
"""
)
SIGN = re.compile(r"COUNT (\d+) disk (\d+) memory (\w+) link (\d)\r?\n")


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

    async def stop(self, sandbox_id: str) -> None:
        await self.vmm.ensure_stopped(sandbox_id, self.folder / sandbox_id, None)
        await self.vmm.ensure_run_directory_absent(self.folder / sandbox_id)

    async def saved(self, name: str) -> MemoryStream:
        """The parent as it is now, over disk files that it writes to no more."""
        top = self.overlay(f"{name}-next").top

        async def switch() -> None:
            await self.vmm.switch_disk(self.parent.run_directory, ROOT_DISK_SERIAL, top)

        await self.vmm.save(self.parent.run_directory, self.folder / name, at_stop=switch, afterwards=nothing)
        self.frozen = list(self.layers)
        self.layers.insert(0, top)
        return MemoryStream(self.folder / name)


class QemuStage(Stage):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.vmm = emulated(INSTALLATION, folder)

    async def begin(self) -> None:
        boot = with_init(await get_boot_files(), COUNTS, self.folder)
        self.parent = machine_spec(PARENT, INSTALLATION, boot, self.folder, network=await best_network())
        self.layers = [self.parent.root.top, *self.parent.root.backing]
        self.frozen = list(self.layers)
        await self.start(self.parent)
        await self.life(PARENT)

    async def life(self, sandbox_id: str) -> tuple[int, bool]:
        seen = await self._signs(sandbox_id)
        async with asyncio.timeout(PATIENCE_SECONDS):
            # The second of two new ones: the first may have been under way.
            while len(signs := await self._signs(sandbox_id)) < len(seen) + 2:
                await asyncio.sleep(0.05)
        assert all(memory == "whole" for _, _, memory, _ in signs)
        assert all(int(disk) + 1 == int(count) for count, disk, _, _ in signs if count != "1"), signs
        return int(signs[-1][0]), signs[-1][3] == "1"

    async def _signs(self, sandbox_id: str) -> list[tuple[str, str, str, str]]:
        console = (await self.vmm.console_tail(self.folder / sandbox_id, 1_000_000)).decode(errors="replace")
        return SIGN.findall(console)

    async def end(self, sandbox_id: str) -> None:
        identity = await self.vmm.find_process(sandbox_id, self.folder / sandbox_id)
        assert identity is not None
        await processes.kill_and_wait(identity)

    def overlay(self, name: str) -> Disk:
        below = self.layers if name.endswith("-next") else self.frozen
        return replace(make_overlay(self.folder / f"{name}.qcow2", below[0]), backing=tuple(below))


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


@pytest.fixture(
    scope="module", params=[pytest.param(QemuStage, marks=pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)), FakeStage]
)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    # Not pytest's folder: its path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="atelier-save-"))
    made = request.param(folder)

    async def end() -> None:
        for sandbox_id in made.sandboxes:
            await made.stop(sandbox_id)

    try:
        asyncio.run(made.begin())
        yield made
    finally:
        asyncio.run(end())
        shutil.rmtree(folder)


def _files(stage: Stage) -> set[str]:
    return {path.name for path in stage.folder.iterdir() if path.is_file()}


async def test_saving_stops_the_machine_in_order_and_it_goes_on(stage: Stage) -> None:
    run, target = stage.parent.run_directory, stage.folder / "in-order"
    moments: list[str] = []

    async def before_stop() -> None:
        moments.append("before")
        await stage.life(PARENT)
        assert not target.exists()

    async def at_stop() -> None:
        moments.append("at")
        assert not target.exists()
        with pytest.raises(ConflictError) as refusal:
            await stage.vmm.save(run, stage.folder / "second")
        assert refusal.value.code == "saving"

    saved = await stage.vmm.save(run, target, before_stop=before_stop, at_stop=at_stop)
    assert moments == ["before", "at"]
    assert target.stat().st_size == saved.size_bytes > 0
    assert target.stat().st_mode & 0o777 == 0o600
    assert 0 <= saved.stopped_ms < 60_000
    assert _files(stage) & {"in-order.new", "second", "second.new"} == set()
    console = await stage.vmm.console_tail(run, 1_000_000)
    await asyncio.sleep(1)
    assert await stage.vmm.console_tail(run, 1_000_000) == console, "it stands still"
    await stage.vmm.go_on(run)
    await stage.vmm.go_on(run)
    await stage.life(PARENT)


async def test_a_machine_goes_on_elsewhere_with_its_link_down(stage: Stage) -> None:
    stream = await stage.saved("elsewhere")
    spec = stage.restored(CLONE, stream)
    before, _ = await stage.life(PARENT)
    await stage.start(spec)
    count, link_is_up = await stage.life(CLONE)
    assert not link_is_up
    assert 1 < count < before + 1000
    await stage.vmm.open_link(spec.run_directory)
    await stage.vmm.open_link(spec.run_directory)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (await stage.life(CLONE))[1]:
            pass
    identity = await stage.vmm.find_process(CLONE, spec.run_directory)
    assert await stage.vmm.ensure_started(spec) == identity, "it was restored before"
    assert (await stage.life(PARENT))[1], "the parent's link was never touched"
    # What was restored can be saved, and restored again.
    await stage.vmm.save(spec.run_directory, stage.folder / "again")
    await stage.stop(CLONE)
    again = replace(spec, restore_from=MemoryStream(stage.folder / "again"))
    await stage.start(again)
    assert (await stage.life(CLONE))[0] > count
    await stage.stop(CLONE)


async def test_many_machines_from_one_image(stage: Stage) -> None:
    stream = await stage.saved("to-bake")
    image = MemoryImage(stage.folder / "memory", stage.folder / "state")
    baking = replace(stage.parent, sandbox_id="baked", run_directory=stage.folder / "baking")
    await stage.vmm.bake(stream, baking, image)
    assert not baking.run_directory.exists()
    assert [path.stat().st_mode & 0o777 for path in (image.memory, image.state)] == [0o400, 0o400]
    assert _files(stage) & {"memory.new", "state.new"} == set()
    contents = image.memory.read_bytes(), image.state.read_bytes()
    specs = [stage.restored(CLONE, image), stage.restored(OTHER, image)]
    await asyncio.gather(*(stage.start(spec) for spec in specs))
    lives = [await stage.life(spec.sandbox_id) for spec in specs]
    assert [link_is_up for _, link_is_up in lives] == [False, False]
    # A private copy is saved whole, as any other machine's memory.
    await stage.vmm.save(specs[0].run_directory, stage.folder / "of-a-clone")
    await stage.stop(CLONE)
    await stage.life(OTHER)
    await stage.start(replace(specs[0], restore_from=MemoryStream(stage.folder / "of-a-clone")))
    assert (await stage.life(CLONE))[0] > lives[0][0]
    assert (image.memory.read_bytes(), image.state.read_bytes()) == contents
    for sandbox_id in (CLONE, OTHER):
        await stage.stop(sandbox_id)
    await stage.life(PARENT)


async def test_what_is_damaged_is_refused_and_leaves_nothing(stage: Stage) -> None:
    stream = await stage.saved("whole")
    image = MemoryImage(stage.folder / "whole-memory", stage.folder / "whole-state")
    baking = replace(stage.parent, sandbox_id="baked", run_directory=stage.folder / "baking")
    await stage.vmm.bake(stream, baking, image)
    half, nothing, short = (stage.folder / name for name in ("half", "nothing", "short"))

    def cut(path: Path) -> Path:
        half.unlink(missing_ok=True)
        half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return half

    short.write_bytes(image.memory.read_bytes()[:-1])
    damaged = [
        MemoryStream(cut(stream.path)),
        MemoryStream(nothing),
        MemoryImage(image.memory, cut(image.state)),
        MemoryImage(image.memory, nothing),
        MemoryImage(short, image.state),
        MemoryImage(nothing, image.state),
    ]
    for source in damaged:
        path = source.path if isinstance(source, MemoryStream) else source.state
        if path == half:
            cut(stream.path if isinstance(source, MemoryStream) else image.state)
        spec = stage.restored(CLONE, source)
        with pytest.raises(VmmError) as refusal:
            await stage.start(spec)
        assert refusal.value.code == "restore_failed", source
        assert refusal.value.hint
        assert await stage.vmm.find_process(CLONE, spec.run_directory) is None
        await stage.stop(CLONE)
        spec.root.top.path.unlink(missing_ok=True)
    before = _files(stage)
    for broken in (MemoryStream(cut(stream.path)), MemoryStream(nothing)):
        with pytest.raises(VmmError) as refusal:
            await stage.vmm.bake(broken, baking, MemoryImage(stage.folder / "no-memory", stage.folder / "no-state"))
        assert refusal.value.code == "bake_failed"
    assert _files(stage) - {"half"} == before - {"half"}
    assert not baking.run_directory.exists()
    await stage.life(PARENT)


@pytest.mark.parametrize("moment", ["before_stop", "at_stop"])
async def test_a_moment_that_fails_leaves_the_machine_running(stage: Stage, moment: str) -> None:
    async def fail() -> None:
        raise HostError("the disk could not be switched", code="told_to_fail")

    run, target = stage.parent.run_directory, stage.folder / "failing"
    with pytest.raises(HostError) as failure:
        if moment == "before_stop":
            await stage.vmm.save(run, target, before_stop=fail)
        else:
            await stage.vmm.save(run, target, at_stop=fail)
    assert failure.value.code == "told_to_fail"
    await stage.life(PARENT)
    assert _files(stage) & {"failing", "failing.new"} == set()


@pytest.mark.parametrize("moment", ["before_stop", "at_stop"])
async def test_giving_up_while_saving_leaves_the_machine_running(stage: Stage, moment: str) -> None:
    reached = asyncio.Event()

    async def hang() -> None:
        reached.set()
        await asyncio.Event().wait()

    run, target = stage.parent.run_directory, stage.folder / "given-up"
    before, at = (hang, None) if moment == "before_stop" else (None, hang)
    saving = asyncio.create_task(stage.vmm.save(run, target, before_stop=before, at_stop=at))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await reached.wait()
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    await stage.life(PARENT)
    assert _files(stage) & {"given-up", "given-up.new"} == set()


async def test_a_folder_that_is_not_there(stage: Stage) -> None:
    with pytest.raises(HostError) as refusal:
        await stage.vmm.save(stage.parent.run_directory, stage.folder / "absent" / "stream")
    assert refusal.value.code == "folder_missing"
    await stage.life(PARENT)


async def test_a_disk_is_switched_once_and_it_is_told(stage: Stage) -> None:
    run, present = stage.parent.run_directory, stage.layers[0]
    top = stage.overlay("switched-next").top
    assert await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, present)
    assert not await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, top)
    for _ in range(2):
        await stage.vmm.switch_disk(run, ROOT_DISK_SERIAL, top)
        assert await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, top)
        assert not await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, present)
    stage.layers.insert(0, top)
    await stage.life(PARENT)
    with pytest.raises(VmmError, match="unknown"):
        await stage.vmm.switch_disk(run, "unknown", top)
    with pytest.raises(VmmError):
        await stage.vmm.writes_to(stage.folder / "nowhere", ROOT_DISK_SERIAL, top)


async def test_a_machine_that_dies_while_it_is_saved(stage: Stage) -> None:
    stream = await stage.saved("before-its-end")
    spec = stage.restored(CLONE, stream)
    await stage.start(spec)

    async def die() -> None:
        await stage.end(CLONE)

    with pytest.raises(VmmError):
        await stage.vmm.save(spec.run_directory, stage.folder / "never", at_stop=die)
    assert _files(stage) & {"never", "never.new"} == set()
    for order in (stage.vmm.go_on, stage.vmm.open_link):
        with pytest.raises(VmmError):
            await order(spec.run_directory)
    with pytest.raises(VmmError):
        await stage.vmm.save(spec.run_directory, stage.folder / "never")
    await stage.stop(CLONE)


async def test_a_stamp_tells_what_does_not_fit(stage: Stage) -> None:
    stamp = await stage.vmm.stamp(stage.parent.boot, "tap")
    assert stamp == await stage.vmm.stamp(stage.parent.boot, "tap")
    assert MachineStamp.from_json(stamp.to_json()) == stamp
    assert stamp.difference(stamp) == ""
    assert stamp.difference(await stage.vmm.stamp(stage.parent.boot, "none")) == "network_kind"
    assert stamp.difference(replace(stamp, vmm_version="0.1")) == "vmm_version"
    # Measured anew at each boot of the host, and never quite the same.
    assert replace(stamp, tsc_khz=2_445_426).difference(replace(stamp, tsc_khz=2_445_400)) == ""
    assert replace(stamp, tsc_khz=2_445_426).difference(replace(stamp, tsc_khz=2_545_426)) == "tsc_khz"
    saved = await stage.vmm.save(stage.parent.run_directory, stage.folder / "stamped", afterwards=nothing)
    assert saved.vmm_version == stamp.vmm_version
