"""What every VMM driver keeps to. The real one boots a kernel whose init waits or ends as the test says."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.fake_firecracker.document import NO_DOCUMENT
from tests.firecracker_machines import FirecrackerStand
from tests.real_machines import INIT_PREPARES, NO_QEMU, emulated, get_boot_files, machine_spec, with_init

from atelier.drivers.vmm.fake import FakeVmm
from atelier.drivers.vmm.interface import VmmDriver
from atelier.host import processes
from atelier.model.errors import HostError, InvalidRequestError, VmmError
from atelier.model.ids import new_installation_id
from atelier.model.machine import ROOT_DISK_SERIAL, BootFiles, Disk, DiskFile, MachineSpec, NetworkAttachment

SANDBOX, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
INSTALLATION = "test"
WAITS = INIT_PREPARES + "echo THE MACHINE IS UP; while true; do sleep 1000; done"
MOMENT_SECONDS = 60


@dataclass
class Bench:
    """A driver, a way to describe a machine of it, and a way to make a machine die without the driver."""

    vmm: VmmDriver
    spec: Callable[[str], MachineSpec]
    end: Callable[[str], Awaitable[None]]
    breaches: Callable[[], list[Any]] = list
    """What the driver has asked for against its VMM's API document."""


@pytest.fixture(
    params=[
        pytest.param("qemu", marks=pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)),
        pytest.param("firecracker", marks=pytest.mark.skipif(bool(NO_DOCUMENT), reason=NO_DOCUMENT)),
        "fake",
    ]
)
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    # Not pytest's folder: its path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="atelier-vmm-"))
    try:
        match request.param:
            case "qemu":
                made = await _qemu(folder)
            case "firecracker":
                made = _firecracker(folder)
            case _:
                made = _fake(folder)
        yield made
        for sandbox in (SANDBOX, OTHER):
            await made.vmm.ensure_stopped(sandbox, folder / sandbox, None)
        assert made.breaches() == []
    finally:
        shutil.rmtree(folder)


async def _qemu(folder: Path) -> Bench:
    boot = with_init(await get_boot_files(), WAITS, folder)
    vmm = emulated(INSTALLATION, folder)
    specs: dict[str, MachineSpec] = {}

    def spec(sandbox_id: str) -> MachineSpec:
        if sandbox_id not in specs:
            specs[sandbox_id] = machine_spec(sandbox_id, INSTALLATION, boot, folder)
        return specs[sandbox_id]

    async def end(sandbox_id: str) -> None:
        identity = await vmm.find_process(sandbox_id, folder / sandbox_id)
        assert identity is not None
        await processes.kill_and_wait(identity)

    return Bench(vmm, spec, end)


def _firecracker(folder: Path) -> Bench:
    """Over the fake Firecracker: no guest boots, everything else is as it is."""
    stand = FirecrackerStand(folder, new_installation_id())
    specs: dict[str, MachineSpec] = {}

    def spec(sandbox_id: str) -> MachineSpec:
        if sandbox_id not in specs:
            specs[sandbox_id] = stand.spec(sandbox_id)
        return specs[sandbox_id]

    async def end(sandbox_id: str) -> None:
        identity = await stand.vmm.find_process(sandbox_id, folder / sandbox_id)
        assert identity is not None
        await processes.kill_and_wait(identity)

    return Bench(stand.vmm, spec, end, stand.breaches)


def _fake(folder: Path) -> Bench:
    vmm = FakeVmm(machine_resident_bytes=1000)
    nowhere = Path("/nonexistent")
    boot = BootFiles(nowhere, nowhere, nowhere, "", "")

    def spec(sandbox_id: str) -> MachineSpec:
        disk = Disk(ROOT_DISK_SERIAL, DiskFile(nowhere, "raw"))
        network = NetworkAttachment("none")
        return MachineSpec(sandbox_id, INSTALLATION, 1, 128, boot, disk, disk, network, folder / sandbox_id)

    async def end(sandbox_id: str) -> None:
        vmm.end_machine(sandbox_id)

    return Bench(vmm, spec, end)


async def _started(bench: Bench, sandbox_id: str = SANDBOX) -> MachineSpec:
    spec = bench.spec(sandbox_id)
    await bench.vmm.ensure_run_directory(sandbox_id, spec.run_directory)
    await bench.vmm.ensure_started(spec)
    return spec


async def test_a_machine_from_start_to_end(bench: Bench) -> None:
    spec = bench.spec(SANDBOX)
    run = spec.run_directory
    assert await bench.vmm.find_process(SANDBOX, run) is None
    await bench.vmm.ensure_run_directory(SANDBOX, run)
    await bench.vmm.ensure_run_directory(SANDBOX, run)
    assert await bench.vmm.console_tail(run, 1000) == b""

    identity = await bench.vmm.ensure_started(spec)
    assert await bench.vmm.ensure_started(spec) == identity
    assert await bench.vmm.find_process(SANDBOX, run) == identity
    ended = asyncio.create_task(bench.vmm.wait_ended(identity))
    async with asyncio.timeout(MOMENT_SECONDS):
        while not await bench.vmm.console_tail(run, 1000):
            await asyncio.sleep(0.05)
    assert not ended.done()

    await bench.vmm.ensure_stopped(SANDBOX, run, identity)
    async with asyncio.timeout(MOMENT_SECONDS):
        await ended
    assert await bench.vmm.find_process(SANDBOX, run) is None
    await bench.vmm.ensure_stopped(SANDBOX, run, identity)
    await bench.vmm.wait_ended(identity)
    assert await bench.vmm.console_tail(run, 1000), "the console outlives its VMM"
    await bench.vmm.ensure_run_directory_absent(run)
    await bench.vmm.ensure_run_directory_absent(run)
    assert not run.exists()
    assert await bench.vmm.console_tail(run, 1000) == b""


async def test_two_starts_at_once_are_one_machine(bench: Bench) -> None:
    spec = bench.spec(SANDBOX)
    await bench.vmm.ensure_run_directory(SANDBOX, spec.run_directory)
    first, second = await asyncio.gather(bench.vmm.ensure_started(spec), bench.vmm.ensure_started(spec))
    assert first == second


async def test_two_machines_do_not_touch_each_other(bench: Bench) -> None:
    spec, other = await _started(bench), await _started(bench, OTHER)
    identity = await bench.vmm.find_process(OTHER, other.run_directory)
    await bench.vmm.ensure_stopped(SANDBOX, spec.run_directory, None)
    assert await bench.vmm.find_process(SANDBOX, spec.run_directory) is None
    assert identity is not None
    assert await bench.vmm.find_process(OTHER, other.run_directory) == identity


async def test_a_process_that_is_not_this_sandboxs_is_not_ended(bench: Bench) -> None:
    """A row that was restored from an old backup, or is damaged, names the process of somebody else."""
    spec, other = await _started(bench), await _started(bench, OTHER)
    somebody_else = await bench.vmm.find_process(OTHER, other.run_directory)
    await bench.vmm.ensure_stopped(SANDBOX, spec.run_directory, somebody_else)
    assert await bench.vmm.find_process(SANDBOX, spec.run_directory) is None
    assert await bench.vmm.find_process(OTHER, other.run_directory) == somebody_else


async def test_stopping_without_knowing_the_process(bench: Bench) -> None:
    spec = await _started(bench)
    await bench.vmm.ensure_stopped(SANDBOX, spec.run_directory, None)
    assert await bench.vmm.find_process(SANDBOX, spec.run_directory) is None


async def test_sandboxes_are_listed_by_process_and_by_run_directory(bench: Bench) -> None:
    folder = bench.spec(SANDBOX).run_directory.parent
    assert await bench.vmm.list_sandboxes(folder / "absent") == []
    await bench.vmm.ensure_run_directory(OTHER, bench.spec(OTHER).run_directory)
    assert await bench.vmm.list_sandboxes(folder) == [OTHER]
    spec = await _started(bench)
    assert await bench.vmm.list_sandboxes(folder) == [SANDBOX, OTHER]
    assert await bench.vmm.list_sandboxes(folder / "absent") == [SANDBOX], "by its process alone"
    await bench.vmm.ensure_stopped(SANDBOX, spec.run_directory, None)
    assert await bench.vmm.list_sandboxes(folder / "absent") == []
    assert await bench.vmm.list_sandboxes(folder) == [SANDBOX, OTHER]
    await bench.vmm.ensure_run_directory_absent(spec.run_directory)
    assert await bench.vmm.list_sandboxes(folder) == [OTHER]


async def test_a_machine_bears_the_boot_and_holds_memory_while_it_runs(bench: Bench) -> None:
    spec = await _started(bench)
    identity = await bench.vmm.ensure_started(spec)
    assert identity.boot_id == bench.vmm.boot_id()
    held = await bench.vmm.resident_bytes([identity])
    assert 0 < held < 2**30
    other_boot = replace(identity, boot_id="another")
    assert await bench.vmm.resident_bytes([other_boot]) == 0
    await bench.end(SANDBOX)
    assert await bench.vmm.resident_bytes([identity]) == 0
    assert await bench.vmm.resident_bytes([]) == 0


async def test_a_disk_grows_and_never_shrinks(bench: Bench) -> None:
    spec = await _started(bench)
    for size_mib in (64, 64, 96):
        await bench.vmm.resize_disk(spec.run_directory, ROOT_DISK_SERIAL, size_mib)
    with pytest.raises(InvalidRequestError) as refusal:
        await bench.vmm.resize_disk(spec.run_directory, ROOT_DISK_SERIAL, 95)
    assert refusal.value.code == "disk_cannot_shrink"
    with pytest.raises(VmmError, match="unknown"):
        await bench.vmm.resize_disk(spec.run_directory, "unknown", 128)
    await bench.end(SANDBOX)
    with pytest.raises(VmmError):
        await bench.vmm.resize_disk(spec.run_directory, ROOT_DISK_SERIAL, 128)


async def test_the_end_of_a_machine_is_noticed_and_it_starts_again(bench: Bench) -> None:
    spec = await _started(bench)
    identity = await bench.vmm.ensure_started(spec)
    ended = asyncio.create_task(bench.vmm.wait_ended(identity))
    await bench.end(SANDBOX)
    async with asyncio.timeout(MOMENT_SECONDS):
        await ended
    assert await bench.vmm.find_process(SANDBOX, spec.run_directory) is None
    again = await bench.vmm.ensure_started(spec)
    assert again != identity
    assert await bench.vmm.find_process(SANDBOX, spec.run_directory) == again


async def test_the_guest_channel_can_be_connected_to(bench: Bench) -> None:
    spec = await _started(bench)
    endpoint = bench.vmm.guest_endpoint(spec.run_directory)
    if endpoint.kind != "vsock":
        assert endpoint.socket_path.parent == spec.run_directory
    if endpoint.kind == "fake":
        return
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(endpoint.socket_path))


async def test_a_start_without_a_run_directory_is_refused(bench: Bench) -> None:
    spec = bench.spec(SANDBOX)
    with pytest.raises(VmmError):
        await bench.vmm.ensure_started(replace(spec, run_directory=spec.run_directory / "absent"))
    assert await bench.vmm.find_process(SANDBOX, spec.run_directory) is None


async def test_the_console_is_bounded(bench: Bench) -> None:
    spec = await _started(bench)
    async with asyncio.timeout(MOMENT_SECONDS):
        while len(await bench.vmm.console_tail(spec.run_directory, 1000)) < 16:
            await asyncio.sleep(0.05)
    first = (await bench.vmm.console_tail(spec.run_directory, 10_000))[:5]
    tail = await bench.vmm.console_tail(spec.run_directory, 5)
    # It grows all the while.
    whole = await bench.vmm.console_tail(spec.run_directory, 10_000)
    assert len(tail) == 5
    assert tail in whole
    assert whole.startswith(first)
    await bench.vmm.trim_console(spec.run_directory, 100_000)
    assert (await bench.vmm.console_tail(spec.run_directory, 10_000)).startswith(whole)
    await bench.vmm.trim_console(spec.run_directory, 10)
    assert 0 < len(await bench.vmm.console_tail(spec.run_directory, 10_000)) < 10_000


async def test_a_fake_host_goes_down_and_comes_up() -> None:
    bench = _fake(Path("/nonexistent"))
    vmm = bench.vmm
    assert isinstance(vmm, FakeVmm)
    assert FakeVmm().boot_id() != vmm.boot_id()
    spec = await _started(bench)
    identity = await vmm.ensure_started(spec)
    vmm.reboot()
    await vmm.wait_ended(identity)
    assert vmm.running == []
    assert vmm.run_directories == {}
    assert identity.boot_id != vmm.boot_id()
    await _started(bench)
    again = await vmm.find_process(SANDBOX, spec.run_directory)
    assert again is not None
    assert again.boot_id == vmm.boot_id()


async def test_the_fake_is_slow_fails_and_hangs_as_told() -> None:
    bench = _fake(Path("/nonexistent"))
    vmm = bench.vmm
    assert isinstance(vmm, FakeVmm)
    await vmm.ensure_run_directory(SANDBOX, bench.spec(SANDBOX).run_directory)
    vmm.faults.fail_next("ensure_started")
    with pytest.raises(HostError):
        await vmm.ensure_started(bench.spec(SANDBOX))
    vmm.faults.hang("ensure_started")
    starting = asyncio.create_task(vmm.ensure_started(bench.spec(SANDBOX)))
    await asyncio.sleep(0.05)
    assert not starting.done()
    assert vmm.running == []
    vmm.faults.release("ensure_started")
    await starting
    assert vmm.running == [SANDBOX]
