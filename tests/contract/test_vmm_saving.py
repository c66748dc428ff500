"""What every VMM driver keeps to when it saves a machine and lets it go on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.fake_firecracker.document import NO_DOCUMENT
from tests.real_machines import NO_QEMU
from tests.saved_machines import (
    CLONE,
    OTHER,
    PARENT,
    PATIENCE_SECONDS,
    FakeStage,
    FirecrackerStage,
    QemuStage,
    Stage,
    nothing,
    running,
)

from atelier.model.errors import ConflictError, HostError, VmmError
from atelier.model.machine import ROOT_DISK_SERIAL, MachineStamp, MemoryImage, MemoryStream, SavedMachine


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(QemuStage, marks=pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)),
        pytest.param(FirecrackerStage, marks=pytest.mark.skipif(bool(NO_DOCUMENT), reason=NO_DOCUMENT)),
        FakeStage,
    ],
)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with running(request.param) as made:
        yield made


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
    await stage.bake(stream, baking, image)
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
    await stage.bake(stream, baking, image)
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
            await stage.bake(broken, baking, MemoryImage(stage.folder / "no-memory", stage.folder / "no-state"))
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


async def test_two_saves_at_once_are_one_and_a_refusal(stage: Stage) -> None:
    targets = [stage.folder / name for name in ("first-at-once", "second-at-once")]
    run = stage.parent.run_directory

    async def take_a_moment() -> None:
        await asyncio.sleep(0.2)

    saves = (stage.vmm.save(run, target, at_stop=take_a_moment, afterwards=nothing) for target in targets)
    outcomes = await asyncio.gather(*saves, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [SavedMachine, ConflictError]
    await stage.life(PARENT)


async def test_a_folder_that_is_not_there(stage: Stage) -> None:
    with pytest.raises(HostError) as refusal:
        await stage.vmm.save(stage.parent.run_directory, stage.folder / "absent" / "stream")
    assert refusal.value.code == "folder_missing"
    await stage.life(PARENT)


async def test_a_disk_is_switched_once_and_it_is_told(stage: Stage) -> None:
    run, present = stage.parent.run_directory, stage.layers[0]
    if isinstance(stage, FirecrackerStage):
        pytest.skip("not applicable: it switches no disks, see test_firecracker_machines.py")
    top = stage.overlay("switched-next").top
    assert await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, present)
    assert not await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, top)
    # One that was made ready only changes nothing, and is no hindrance to the next.
    async with stage.vmm.disk_switch(run, ROOT_DISK_SERIAL, top):
        assert await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, present)
    assert await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, present)
    for _ in range(2):
        async with stage.vmm.disk_switch(run, ROOT_DISK_SERIAL, top) as switch:
            await switch()
            await switch()
        assert await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, top)
        assert not await stage.vmm.writes_to(run, ROOT_DISK_SERIAL, present)
    stage.layers.insert(0, top)
    await stage.life(PARENT)
    with pytest.raises(VmmError, match="unknown"):
        async with stage.vmm.disk_switch(run, "unknown", top):
            pass
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
