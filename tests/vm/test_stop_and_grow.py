"""A real guest whose clock is set right, whose disk grows under it, and that stops in order and comes back with its data.

One machine over a volume whose image is gone from the cache, by the drivers alone: no manager. The tests run in order.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.real_machines import (
    INIT_PREPARES,
    NO_QEMU,
    emulated,
    get_base_image,
    get_boot_files,
    machine_spec,
    with_init,
)

from atelier.drivers.guest.agent import AgentGuests
from atelier.drivers.network.user import UserNetwork
from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.drivers.vmm import qemu_arguments
from atelier.drivers.vmm.qemu import QemuVmm
from atelier.host.file_pins import ensure_pinned
from atelier.host.process_limits import may_raise_hard_limits
from atelier.model.errors import GuestUnreachableError, InvalidRequestError
from atelier.model.guest import GuestIdentity, ProcessEnded, ProcessOutput, ProcessSpec
from atelier.model.layout import RunLayout
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    TOOLS_DISK_SERIAL,
    Disk,
    DiskFile,
    MachineSpec,
    ProcessIdentity,
    VolumeRequest,
)

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

SANDBOX, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
INSTALLATION = "stop"
TOKEN = "the-token"
MIB = 2**20
READY_SECONDS = 120
GRACE_SECONDS = 30


@dataclass
class Machine:
    """``spec`` is what it was started with last."""

    vmm: QemuVmm
    storage: Qcow2Storage
    run: RunLayout
    spec: MachineSpec

    async def start(self) -> ProcessIdentity:
        """Over the volume as it is found on disk."""
        directory = self.spec.run_directory
        root = await self.storage.find_volume(SANDBOX)
        assert root == self.spec.root
        await self.vmm.ensure_run_directory(SANDBOX, directory)
        async with self.guests(is_up=False) as guests:
            identity = await self.vmm.ensure_started(self.spec)
            await guests.wait_ready(SANDBOX, READY_SECONDS)
            who = GuestIdentity("box", "0" * 32, TOKEN, secrets.token_bytes(32), time.time_ns(), {})
            await guests.initialize(SANDBOX, who)
        return identity

    async def identity(self) -> ProcessIdentity:
        found = await self.vmm.find_process(SANDBOX, self.spec.run_directory)
        assert found is not None
        return found

    @asynccontextmanager
    async def guests(self, *, is_up: bool = True) -> AsyncIterator[AgentGuests]:
        driver = AgentGuests(self.run.channel_socket, self.run.gateway_socket)
        try:
            await driver.ensure_channel(SANDBOX, self.vmm.guest_endpoint(self.spec.run_directory), TOKEN)
            if is_up:
                await driver.wait_ready(SANDBOX, READY_SECONDS)
            yield driver
        finally:
            await driver.close()


async def run(guests: AgentGuests, *arguments: str) -> str:
    """What the program wrote, run as root; it must succeed."""
    output = bytearray()
    async with guests.start_process(SANDBOX, ProcessSpec(arguments, user="root", timeout_seconds=120)) as events:
        async for event in events:
            if isinstance(event, ProcessOutput):
                output += event.data
            elif isinstance(event, ProcessEnded):
                assert event.exit_code == 0, (arguments, output, event)
    return output.decode()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    # Short: sockets lie below it.
    folder = Path(tempfile.mkdtemp(prefix="atl-stop-"))
    layout = RunLayout(folder / "run")
    gateway = subprocess.Popen([sys.executable, "-m", "atelier.gateway", "--run-dir", str(layout.root)])
    made: Machine | None = None
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not layout.gateway_socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        made = asyncio.run(_made(folder, layout))
        asyncio.run(made.start())
        yield made
    finally:
        if made is not None:
            asyncio.run(made.vmm.ensure_stopped(SANDBOX, made.spec.run_directory, None))
        gateway.send_signal(signal.SIGTERM)
        gateway.wait(READY_SECONDS)
        shutil.rmtree(folder)


async def _made(folder: Path, layout: RunLayout) -> Machine:
    boot = await get_boot_files()
    image = await get_base_image()
    # A cache of its own, which is emptied before the first start.
    cached = folder / "cache" / image.path.name
    cached.parent.mkdir()
    ensure_pinned(image.path, cached)
    storage = Qcow2Storage(folder / "volumes")
    root = await storage.ensure_volume(VolumeRequest(SANDBOX, DiskFile(cached, "raw"), image.size_mib))
    cached.unlink()
    spec = MachineSpec(
        sandbox_id=SANDBOX,
        installation_id=INSTALLATION,
        vcpu_count=1,
        memory_mib=512,
        boot=boot,
        root=root,
        tools=Disk(TOOLS_DISK_SERIAL, DiskFile(boot.tools, "raw"), read_only=True),
        network=await UserNetwork().ensure_slot(SANDBOX, 0),
        run_directory=layout.vmm_directory(SANDBOX),
    )
    return Machine(emulated(INSTALLATION, folder), storage, layout, spec)


# The clock.


async def offset_seconds(guests: AgentGuests) -> float:
    """The guest's clock less the host's, right to half of what the question takes."""
    before = time.time()
    told = float(await run(guests, "date", "+%s.%N"))
    return told - (before + time.time()) / 2


async def synchronize(guests: AgentGuests) -> tuple[float, float]:
    """(the guest's clock less the host's, by how much that may be wrong), seconds: the longer the question takes, the
    less is known."""
    began = time.monotonic()
    offset = await guests.synchronize_clock(SANDBOX)
    return offset, (time.monotonic() - began) / 2


async def test_a_clock_that_is_behind_is_set_at_once(machine: Machine) -> None:
    async with machine.guests() as guests:
        await run(guests, "date", "-s", "-5 seconds")
        before, error = await synchronize(guests)
        # How long the guest took to run date, on a busy host, is its own.
        assert -15 < before < -4.5 + error
        remaining, error = await synchronize(guests)
        print(f"off by {remaining:+.4f} s after it was 5 s behind")
        assert abs(remaining) < 0.2 + error
        assert abs(await offset_seconds(guests)) < 1


WATCH = """
import time
began = time.monotonic()
last, backwards, reads = time.time_ns(), 0, 0
while time.monotonic() - began < %d:
    now = time.time_ns()
    backwards += now < last
    last, reads = now, reads + 1
    if reads %% 200 == 0:
        time.sleep(0.005)
print(backwards, reads)
"""
WATCH_SECONDS = 12


async def test_a_clock_that_is_ahead_is_slowed_down_and_never_goes_back(machine: Machine) -> None:
    async with machine.guests() as guests:
        await guests.synchronize_clock(SANDBOX)
        await run(guests, "python3", "-c", "import time; time.clock_settime(0, time.time() + 0.2)")
        watching = asyncio.create_task(run(guests, "python3", "-c", WATCH % WATCH_SECONDS))
        await asyncio.sleep(1)
        before, before_error = await synchronize(guests)
        assert 0.05 - before_error < before < 0.6 + before_error
        backwards, reads = (int(word) for word in (await watching).split())
        remaining, error = await synchronize(guests)
        print(f"ahead by {before:.4f} s, {WATCH_SECONDS} s later by {remaining:+.4f} s; {reads} reads")
        assert backwards == 0
        assert reads > 1000
        assert abs(remaining) < before / 2 + before_error + error


async def test_a_clock_that_is_far_ahead_is_slowed_down_until_it_is_right(machine: Machine) -> None:
    """More than the kernel takes at once: the agent goes on by itself."""
    async with machine.guests() as guests:
        await run(guests, "python3", "-c", "import time; time.clock_settime(0, time.time() + 0.6)")
        watching = asyncio.create_task(run(guests, "python3", "-c", WATCH % WATCH_SECONDS))
        await asyncio.sleep(1)
        before, error = await synchronize(guests)
        assert 0.4 - error < before < 1 + error
        assert (await watching).split()[0] == "0"
        begun = time.monotonic()
        while abs(await offset_seconds(guests)) > 0.1 and time.monotonic() - begun < 10:
            await asyncio.sleep(1)
        remaining, error = await synchronize(guests)
        waited = WATCH_SECONDS + time.monotonic() - begun
        print(f"off by {remaining:+.4f} s, {waited:.0f} s after it was 0.6 s ahead")
        assert abs(remaining) < 0.2 + error


# The disk.


def file_size_limits(pid: int) -> list[int]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    words = next(line for line in lines if line.startswith("Max file size")).split()[3:5]
    return [resource.RLIM_INFINITY if word == "unlimited" else int(word) for word in words]


async def test_a_disk_grows_under_a_running_guest(machine: Machine) -> None:
    directory = machine.spec.run_directory
    pid = (await machine.identity()).pid
    assert await machine.vmm.list_sandboxes(directory.parent) == [SANDBOX]
    assert await QemuVmm("othr", cache_dir=directory).list_sandboxes(directory / "absent") == [], "not another's"
    assert 50 * MIB < await machine.vmm.resident_bytes([await machine.identity()]) < 1024 * MIB
    async with machine.guests() as guests:
        before = int(await run(guests, "blockdev", "--getsize64", "/dev/vda"))
        grown_mib = before // MIB + 1024
        soft, hard = file_size_limits(pid)
        assert before < soft < before + 100 * MIB, "no larger file than its disk needs"
        assert (hard == soft) == await may_raise_hard_limits()

        await machine.vmm.resize_disk(directory, ROOT_DISK_SERIAL, grown_mib)
        await machine.vmm.resize_disk(directory, ROOT_DISK_SERIAL, grown_mib)
        with pytest.raises(InvalidRequestError) as refusal:
            await machine.vmm.resize_disk(directory, ROOT_DISK_SERIAL, grown_mib - 1)
        assert refusal.value.code == "disk_cannot_shrink"
        assert grown_mib * MIB < file_size_limits(pid)[0] < grown_mib * MIB + 100 * MIB

        assert int(await run(guests, "blockdev", "--getsize64", "/dev/vda")) == grown_mib * MIB
        # Straight to the disk's last megabyte, as the file system would in time.
        end = grown_mib - 1
        write = f"head -c 1048576 /dev/zero | tr '\\0' E | dd of=/dev/vda bs=1M seek={end} conv=notrunc,fsync"
        await run(guests, "sh", "-c", write)
        read = f"dd if=/dev/vda bs=1M skip={end} count=1 iflag=direct | tr -d E | wc -c"
        assert (await run(guests, "sh", "-c", f"({read}) 2>/dev/null")).strip() == "0"
        await run(guests, "resize2fs", "/dev/vda")
        total_kib = int((await run(guests, "df", "--output=size", "/")).split()[-1])
        assert total_kib > before // 1024
    told = subprocess.check_output(["qemu-img", "info", "-U", "--output=json", str(machine.spec.root.top.path)])
    assert json.loads(told)["virtual-size"] == grown_mib * MIB


FILLS_ITS_GROWN_DISK = (
    INIT_PREPARES
    + """
for block in /sys/block/vd*; do
    read -r serial <$block/serial
    [ "$serial" = atelier-root ] && name=${block##*/}
done
echo WAITING
while read -r sectors </sys/block/$name/size; [ "$sectors" -lt 1048576 ]; do usleep 50000; done
echo "SEES $sectors"
dd if=/dev/zero of=/dev/$name bs=1M count=100 conv=notrunc,fsync && echo FILLED
reboot -f
"""
)


async def test_a_guest_may_write_as_much_as_its_disk_grew_by() -> None:
    """Far past the size that the file of its disk of 16 MiB could have at the start: without a raised limit it fails."""
    folder = Path(tempfile.mkdtemp(prefix="atl-grow-"))
    folder.chmod(0o711)
    vmm = emulated(INSTALLATION, folder)
    spec = machine_spec(OTHER, INSTALLATION, with_init(await get_boot_files(), FILLS_ITS_GROWN_DISK, folder), folder)

    async def console() -> str:
        return (await vmm.console_tail(spec.run_directory, 10_000)).decode(errors="replace")

    try:
        await vmm.ensure_run_directory(OTHER, spec.run_directory)
        identity = await vmm.ensure_started(spec)
        assert file_size_limits(identity.pid)[0] < 100 * MIB
        async with asyncio.timeout(READY_SECONDS):
            while "WAITING" not in await console():
                await asyncio.sleep(0.05)
            await vmm.resize_disk(spec.run_directory, ROOT_DISK_SERIAL, 512)
            await vmm.wait_ended(identity)
        said = await console()
        assert "SEES 1048576" in said
        assert "FILLED" in said, said
        assert spec.root.top.path.stat().st_size > 100 * MIB
    finally:
        await vmm.ensure_stopped(OTHER, spec.run_directory, None)
        shutil.rmtree(folder)


SPY = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
static void *ask(void *unused) {
    struct rlimit limit;
    sleep(3);
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = limit.rlim_max;
    int set = syscall(SYS_setrlimit, RLIMIT_FSIZE, &limit) ? errno : 0;
    int niced = syscall(SYS_setpriority, 0, 0, 1) ? errno : 0;
    fprintf(stderr, "setrlimit %d setpriority %d\n", set, niced);
    _exit(0);
}
__attribute__((constructor)) static void begin(void) { pthread_t thread; pthread_create(&thread, 0, ask, 0); }
"""


def test_qemus_own_sandbox_does_not_hold_the_soft_limit(tmp_path: Path) -> None:
    """Why the hard limit matters, and is as low as it can be: once broken out of, QEMU raises the soft one by itself."""
    if shutil.which("cc") is None:
        pytest.skip("not applicable: no C compiler to make a library that asks from inside QEMU")
    (tmp_path / "spy.c").write_text(SPY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "spy.so", tmp_path / "spy.c", "-lpthread"], check=True)
    locked_down = ["-sandbox", qemu_arguments.LOCKED_DOWN]
    told = subprocess.run(
        [
            *("prlimit", "--fsize=1000000:2000000"),
            *("qemu-system-x86_64", "-nodefaults", "-nographic", "-machine", "microvm", "-S", *locked_down),
        ],
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "spy.so")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    denied = f"setpriority {errno.EPERM}"
    assert denied in told.stderr, "the sandbox is on"
    assert told.stderr == f"setrlimit 0 {denied}\n", "else QEMU has learned it, and file_size_limits can be simpler"


# The end.


async def test_what_was_not_yet_on_disk_is_there_after_an_orderly_stop(machine: Machine) -> None:
    identity = await machine.identity()
    content = secrets.token_hex(3 * MIB)
    async with machine.guests() as guests:

        async def chunks() -> AsyncIterator[bytes]:
            yield content.encode()

        await run(guests, "sh", "-c", "echo 60000 >/proc/sys/vm/dirty_writeback_centisecs")
        # Ends by itself only by SIGKILL.
        async with guests.start_process(SANDBOX, ProcessSpec(("sh", "-c", "trap '' TERM; while :; do sleep 1; done"))):
            await guests.write_file(SANDBOX, b"/root/before", chunks(), "root")
            await run(guests, "sh", "-c", "cp /root/before /root/late; echo 'just before' >/root/last")
            asked_at = time.monotonic()
            await guests.shut_down(SANDBOX)
            print(f"agreed after {time.monotonic() - asked_at:.2f} s")
            await guests.shut_down(SANDBOX)
        async with asyncio.timeout(GRACE_SECONDS):
            await machine.vmm.wait_ended(identity)
        print(f"ended {time.monotonic() - asked_at:.2f} s after it was asked to")
        with pytest.raises(GuestUnreachableError):
            await guests.shut_down(SANDBOX)
    assert await machine.vmm.find_process(SANDBOX, machine.spec.run_directory) is None
    subprocess.run(["qemu-img", "check", "-q", str(machine.spec.root.top.path)], check=True)

    await machine.storage.grow_volume(SANDBOX, 8192)
    await machine.start()
    async with machine.guests() as guests:
        assert await run(guests, "cat", "/root/last") == "just before\n"
        await run(guests, "cmp", "/root/before", "/root/late")
        assert await run(guests, "cat", "/root/late") == content
        assert int(await run(guests, "blockdev", "--getsize64", "/dev/vda")) == 8192 * MIB
    assert os.listdir(machine.spec.run_directory.parent) == [SANDBOX]
