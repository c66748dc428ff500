"""A real machine of the QEMU driver: what its process may do, that it outlives its manager, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tests.real_machines import (
    INIT_PREPARES,
    NO_QEMU,
    emulated,
    get_boot_files,
    machine_spec,
    make_overlay,
    make_small_image,
    with_init,
)
from tests.vm.ordinary_user import as_ordinary_user

from atelier.drivers.network.user import UserNetwork
from atelier.drivers.vmm import kvm_probe
from atelier.drivers.vmm.qemu import QemuVmm
from atelier.drivers.vmm.qemu_arguments import tcg_kernel_arguments
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.drivers.vmm.run_folder import RunFolder
from atelier.drivers.vmm.vmm_users import find_user_range
from atelier.host import processes
from atelier.host.process_limits import may_raise_hard_limits
from atelier.host.tsc import measure_tsc_khz
from atelier.model.errors import MissingProgramError, VmmError
from atelier.model.machine import ROOT_DISK_SERIAL, BootFiles, Disk, DiskFile, MachineSpec, ProcessIdentity
from atelier.model.machine_limits import DiskRate

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

SANDBOX, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
INSTALLATION = "conf"
MOMENT_SECONDS = 60
UP = "THE MACHINE IS UP"
WAITS = INIT_PREPARES + f"echo {UP}; while true; do sleep 1000; done"


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not pytest's folder: its path is too long for a socket, and closed to the ordinary user.
    made = Path(tempfile.mkdtemp(prefix="atelier-qemu-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def boot(folder: Path) -> BootFiles:
    """Boot files that any user can read, whose init says that it is up and waits."""
    found = await get_boot_files()
    kernel = folder / "kernel"
    shutil.copyfile(found.kernel, kernel)
    return with_init(replace(found, kernel=kernel), WAITS, folder)


async def _start(vmm: QemuVmm, spec: MachineSpec) -> ProcessIdentity:
    await vmm.ensure_run_directory(spec.sandbox_id, spec.run_directory)
    return await vmm.ensure_started(spec)


async def _console_says(vmm: QemuVmm, run_directory: Path, words: str) -> None:
    async with asyncio.timeout(MOMENT_SECONDS):
        while words not in (await vmm.console_tail(run_directory, 50_000)).decode(errors="replace"):
            await asyncio.sleep(0.05)


async def _look_at(pid: int) -> dict[str, Any]:
    """What /proc says of the process that matters here."""
    process = Path(f"/proc/{pid}")
    lines = (process / "status").read_text().splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    limits = {line[:25].strip(): line[25:].split()[:2] for line in (process / "limits").read_text().splitlines()[1:]}
    links: list[str] = []
    for entry in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # it may be closed while the others are looked at
            links.append(os.readlink(entry))
    may_raise = await may_raise_hard_limits()
    return {
        "status": status,
        "may_raise": may_raise,
        "limits": limits,
        "open": sorted({link for link in links if link.startswith("/")}),
    }


def _assert_confined(seen: dict[str, Any], spec: MachineSpec) -> None:
    status = seen["status"]
    assert status["Seccomp"] == ["2"]
    assert status["NoNewPrivs"] == ["1"]
    assert int(status["CapEff"][0], 16) == int(status["CapPrm"][0], 16) == int(status["CapAmb"][0], 16) == 0
    assert status["Groups"] == []
    limits = seen["limits"]
    assert limits["Max open files"] == ["256", "256"]
    assert limits["Max core file size"] == ["0", "0"]
    soft, hard = (int(limit) for limit in limits["Max file size"])
    disk_bytes = 16 * 1024 * 1024
    assert disk_bytes < soft < disk_bytes + 100 * 1024 * 1024
    # Higher where the manager could not raise it when the disk grows, and bounded there too.
    assert hard == soft if seen["may_raise"] else soft < hard < 2**45
    assert seen["open"] == sorted(
        {
            "/dev/null",
            str(spec.boot.kernel),
            str(spec.boot.initramfs),
            str(spec.root.top.path),
            *(str(file.path) for file in spec.root.backing),
            str(spec.tools.top.path),
            str(spec.run_directory / "console.log"),
            str(spec.run_directory / "qemu.log"),
        }
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="a user id of its own needs root")
async def test_under_root_each_machine_has_a_user_of_its_own(folder: Path, boot: BootFiles) -> None:
    users = find_user_range()
    if users is None:
        pytest.skip("root here has too few user ids")
    vmm = emulated(INSTALLATION, folder)
    specs = [
        machine_spec(sandbox, INSTALLATION, boot, folder, network=await UserNetwork().ensure_slot(sandbox, 0))
        for sandbox in (SANDBOX, OTHER)
    ]
    # The disks are root's alone: the machine works by its open descriptors.
    for spec in specs:
        for path in (spec.root.top.path, spec.tools.top.path):
            path.chmod(0o600)
    try:
        identities = [await _start(vmm, spec) for spec in specs]
        seen = [await _look_at(identity.pid) for identity in identities]
        for one, spec in zip(seen, specs, strict=True):
            _assert_confined(one, spec)
        user_ids = [set(one["status"]["Uid"]) for one in seen]
        assert user_ids == [set(one["status"]["Gid"]) for one in seen]
        assert [len(ids) for ids in user_ids] == [1, 1]
        first, second = (int(ids.pop()) for ids in user_ids)
        assert first != second
        assert {first, second} <= set(range(users.first, users.first + users.count))
        for spec in specs:
            await _console_says(vmm, spec.run_directory, UP)
            assert spec.run_directory.stat().st_uid == 0
            assert spec.run_directory.stat().st_mode & 0o777 == 0o700
    finally:
        for spec in specs:
            await vmm.ensure_stopped(spec.sandbox_id, spec.run_directory, None)


def test_an_ordinary_user_runs_machines_too(folder: Path) -> None:
    boot = asyncio.run(_prepared(folder))
    home = folder / "home"
    home.mkdir()
    home.chmod(0o777)

    async def act() -> dict[str, Any]:
        vmm = emulated(INSTALLATION, home)
        spec = machine_spec(SANDBOX, INSTALLATION, boot, home, network=await UserNetwork().ensure_slot(SANDBOX, 0))
        identity = await _start(vmm, spec)
        try:
            seen = await _look_at(identity.pid)
            _assert_confined(seen, spec)
            await _console_says(vmm, spec.run_directory, UP)
            await vmm.resize_disk(spec.run_directory, ROOT_DISK_SERIAL, 1024)
            raised = int((await _look_at(identity.pid))["limits"]["Max file size"][0])
            assert 1024 * 2**20 < raised < 1124 * 2**20
        finally:
            await vmm.ensure_stopped(SANDBOX, spec.run_directory, identity)
        assert await vmm.find_process(SANDBOX, spec.run_directory) is None
        await vmm.ensure_run_directory_absent(spec.run_directory)
        assert not spec.run_directory.exists()
        return seen

    seen = as_ordinary_user(lambda: asyncio.run(act()))
    assert "0" not in seen["status"]["Uid"]


async def _prepared(folder: Path) -> BootFiles:
    found = await get_boot_files()
    shutil.copyfile(found.kernel, folder / "kernel")
    return with_init(replace(found, kernel=folder / "kernel"), WAITS, folder)


def test_a_machine_outlives_its_manager_and_is_found_again(folder: Path) -> None:
    boot = asyncio.run(_prepared(folder))
    spec = machine_spec(SANDBOX, INSTALLATION, boot, folder)

    def first_manager() -> dict[str, Any]:
        return asdict(asyncio.run(_start(emulated(INSTALLATION, folder), spec)))

    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write_end, json.dumps(first_manager()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        started = ProcessIdentity(**json.load(pipe))

    async def second_manager() -> None:
        vmm = emulated(INSTALLATION, folder)
        try:
            assert processes.is_alive(started)
            assert await vmm.find_process(SANDBOX, spec.run_directory) == started
            # As if the first had died before it could write down what it had started.
            (spec.run_directory / "vmm.json").unlink()
            assert await vmm.find_process(SANDBOX, spec.run_directory) == started
            assert await vmm.ensure_started(spec) == started
            # Another installation's machine of the same sandbox id is not ours.
            assert await emulated("othr", folder).find_process(SANDBOX, folder / "elsewhere") is None
            async with await QmpConnection.open(spec.run_directory / "control.sock") as control:
                assert (await control.query("query-status"))["status"] == "running"
        finally:
            await vmm.ensure_stopped(SANDBOX, spec.run_directory, None)
        assert not processes.is_alive(started)

    asyncio.run(second_manager())


async def test_a_process_that_only_bears_the_name_is_left_alone(folder: Path, boot: BootFiles) -> None:
    vmm = emulated(INSTALLATION, folder)
    impostor = subprocess.Popen(["sh", "-c", "sleep 1000; true", "-name", f"atelier-{INSTALLATION}-{SANDBOX}", "x"])
    try:
        assert await vmm.find_process(SANDBOX, folder / SANDBOX) is None
        await vmm.ensure_stopped(SANDBOX, folder / SANDBOX, ProcessIdentity(impostor.pid, 1, processes.boot_id()))
        assert impostor.poll() is None
    finally:
        subprocess.run(["kill", "--", *(str(child) for child in _children(impostor.pid))], check=True)
        impostor.kill()
        impostor.wait()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_file_that_is_no_kernel_is_refused_in_qemus_words(folder: Path, boot: BootFiles) -> None:
    vmm = emulated(INSTALLATION, folder)
    rubbish = folder / "rubbish"
    rubbish.write_bytes(os.urandom(100_000))
    spec = machine_spec(SANDBOX, INSTALLATION, replace(boot, kernel=rubbish), folder)
    with pytest.raises(VmmError, match="kernel") as refusal:
        await _start(vmm, spec)
    assert SANDBOX in refusal.value.message
    assert await vmm.find_process(SANDBOX, spec.run_directory) is None
    await vmm.ensure_run_directory_absent(spec.run_directory)


async def test_a_guest_that_panics_ends_and_leaves_its_last_words(folder: Path, boot: BootFiles) -> None:
    vmm = emulated(INSTALLATION, folder)
    rubbish = folder / "rubbish"
    rubbish.write_bytes(os.urandom(100_000))
    spec = machine_spec(SANDBOX, INSTALLATION, replace(boot, initramfs=rubbish), folder)
    identity = await _start(vmm, spec)
    try:
        async with asyncio.timeout(MOMENT_SECONDS):
            await vmm.wait_ended(identity)
    finally:
        await vmm.ensure_stopped(SANDBOX, spec.run_directory, identity)
    assert b"Kernel panic" in await vmm.console_tail(spec.run_directory, 10_000)
    assert await vmm.find_process(SANDBOX, spec.run_directory) is None


async def test_more_memory_than_there_is(folder: Path, boot: BootFiles) -> None:
    vmm = emulated(INSTALLATION, folder)
    spec = machine_spec(SANDBOX, INSTALLATION, boot, folder, memory_mib=1024 * 1024 * 200)
    with pytest.raises(VmmError) as refusal:
        await _start(vmm, spec)
    assert "memory" in refusal.value.message
    assert "memory" in refusal.value.hint


async def test_a_missing_disk_is_named(folder: Path, boot: BootFiles) -> None:
    vmm = emulated(INSTALLATION, folder)
    spec = machine_spec(SANDBOX, INSTALLATION, boot, folder)
    spec.root.backing[0].path.unlink()
    with pytest.raises(VmmError, match=str(spec.root.backing[0].path)):
        await _start(vmm, spec)
    assert await vmm.find_process(SANDBOX, spec.run_directory) is None


async def test_without_qemu_the_package_is_named(
    folder: Path, boot: BootFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmm = emulated(INSTALLATION, folder)
    spec = machine_spec(SANDBOX, INSTALLATION, boot, folder)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(MissingProgramError) as refusal:
        await _start(vmm, spec)
    assert refusal.value.hint == "apt-get install qemu-system-x86"


async def test_a_disk_with_a_long_chain_and_what_the_guest_writes_to_it(folder: Path, boot: BootFiles) -> None:
    """The guest reads a byte of the base through three files and writes to the top; the others stay as they were."""
    vmm = emulated(INSTALLATION, folder)
    base = make_small_image(folder / "base.img")
    with base.path.open("r+b") as file:
        file.seek(1024 * 1024)
        file.write(b"OUT OF THE BASE")
    middle = make_overlay(folder / "middle.qcow2", base).top
    top = make_overlay(folder / "top.qcow2", middle)
    spec = machine_spec(SANDBOX, INSTALLATION, boot, folder)
    script = (
        INIT_PREPARES
        + """
for block in /sys/block/vd*; do
    read -r serial <$block/serial
    echo "DISK $serial ro=$(cat $block/ro)"
    [ "$serial" = atelier-root ] && root=/dev/${block##*/}
    [ "$serial" = atelier-tools ] && tools=/dev/${block##*/}
done
echo "READ $(dd if=$root bs=1 skip=1048576 count=15 2>/dev/null)"
echo -n "WRITTEN BY THE GUEST" | dd of=$root bs=1 seek=2097152 conv=fsync,notrunc 2>/dev/null && echo WRITTEN
echo x | dd of=$tools bs=1 conv=fsync 2>/dev/null || echo TOOLS REFUSED
reboot -f
"""
    )
    spec = replace(
        spec, root=replace(top, backing=(middle, base)), boot=with_init(await get_boot_files(), script, folder)
    )
    before = [file.path.read_bytes() for file in (middle, base, spec.tools.top)]
    identity = await _start(vmm, spec)
    try:
        async with asyncio.timeout(MOMENT_SECONDS):
            await vmm.wait_ended(identity)
    finally:
        await vmm.ensure_stopped(SANDBOX, spec.run_directory, identity)
    console = (await vmm.console_tail(spec.run_directory, 10_000)).decode(errors="replace")
    assert "DISK atelier-root ro=0" in console
    assert "DISK atelier-tools ro=1" in console
    assert "READ OUT OF THE BASE" in console
    assert "WRITTEN" in console
    assert "TOOLS REFUSED" in console
    assert [file.path.read_bytes() for file in (middle, base, spec.tools.top)] == before
    written = subprocess.check_output(
        ["qemu-io", "-f", "qcow2", "-r", "-c", "read -v 2097152 20", str(top.top.path)], text=True
    )
    assert "WRITTEN.BY.THE.G" in written


@pytest.mark.skipif(os.geteuid() != 0, reason="a loop device needs root")
async def test_a_disk_that_is_a_device_grows_with_it_and_keeps_to_its_rate(folder: Path) -> None:
    image = make_small_image(folder / "device.img").path
    loop = subprocess.check_output(["losetup", "--find", "--show", image], text=True).strip()
    vmm = emulated(INSTALLATION, folder, disk_rate=DiskRate(operations_per_second=50))
    script = (
        INIT_PREPARES
        + """
for block in /sys/block/vd*; do [ "$(cat $block/serial)" = atelier-root ] && size=$block/size; done
echo "OF $(cat $size) SECTORS"
until [ $(cat $size) = 65536 ]; do sleep 0.1; done
echo GROWN
while true; do sleep 1000; done
"""
    )
    spec = replace(
        machine_spec(SANDBOX, INSTALLATION, with_init(await get_boot_files(), script, folder), folder),
        root=Disk(ROOT_DISK_SERIAL, DiskFile(Path(loop), "raw")),
    )
    identity = None
    try:
        identity = await _start(vmm, spec)
        await _console_says(vmm, spec.run_directory, "OF 32768 SECTORS")
        assert await vmm.writes_to(spec.run_directory, ROOT_DISK_SERIAL, spec.root.top)
        os.truncate(image, 32 * 1024 * 1024)
        subprocess.run(["losetup", "--set-capacity", loop], check=True)
        # Its storage takes whole blocks: the device is larger than was asked for.
        await vmm.resize_disk(spec.run_directory, ROOT_DISK_SERIAL, 31)
        await _console_says(vmm, spec.run_directory, "GROWN")
        async with await QmpConnection.open(RunFolder(spec.run_directory).control_socket) as control:
            told: Any = await control.execute("query-block")
        inserted = next(each["inserted"] for each in told if each["inserted"]["node-name"].startswith("device-"))
        assert (inserted["iops"], inserted["bps"], inserted["image"]["virtual-size"]) == (50, 0, 32 * 1024 * 1024)
    finally:
        await vmm.ensure_stopped(SANDBOX, spec.run_directory, identity)
        subprocess.run(["losetup", "--detach", loop], check=True)


async def test_the_probes_guest_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The initramfs' own answer, in emulation, so that a "no" of the KVM probe says something about KVM."""
    boot = await get_boot_files()
    script = folder / "emulated-probe"
    # The probe starts this as if it were QEMU under KVM.
    script.write_text(
        "#!/usr/bin/env python3\nimport os, sys\n"
        "a = sys.argv\n"
        "a[a.index('kvm')] = 'tcg'\n"
        "a[a.index('host')] = 'max'\n"
        f"a[a.index('-append') + 1] += ' ' + {' '.join(_tcg_words())!r}\n"
        "os.execvp('qemu-system-x86_64', ['qemu-system-x86_64', *a[1:]])\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(kvm_probe, "_TIME_LIMIT_SECONDS", float(MOMENT_SECONDS))
    answer = await kvm_probe.boot_tiny_guest(script, boot, None)
    assert answer.usable, answer.reason


def _tcg_words() -> list[str]:
    return tcg_kernel_arguments(measure_tsc_khz())


async def test_auto_means_kvm_only_where_a_guest_boots_on_it(folder: Path) -> None:
    boot = await get_boot_files()
    auto = QemuVmm(INSTALLATION, cache_dir=folder / "cache", accelerator="auto")
    chosen = await auto.prepare(boot)
    assert auto.kvm_answer is not None
    assert chosen == ("kvm" if auto.kvm_answer.usable else "tcg")
    assert auto.name == f"qemu-{chosen}"
    demanded = QemuVmm(INSTALLATION, cache_dir=folder / "cache", accelerator="kvm")
    if auto.kvm_answer.usable:
        assert await demanded.prepare(boot) == "kvm"
    else:
        with pytest.raises(VmmError, match="KVM was asked for") as refusal:
            await demanded.prepare(boot)
        assert "ATELIER_ACCELERATOR=tcg" in refusal.value.hint
