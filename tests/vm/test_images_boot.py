"""Our init scripts in a real guest, on a root file system with nothing in it: the way from the kernel to the guest agent,
its respawning, orphans, and the words on the console when something is missing.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.real_machines import NO_QEMU, REPOSITORY, emulated, images_of_this_checkout, machine_spec

from atelier.drivers.images.debian import DebianImages
from atelier.model.machine import TOOLS_DISK_SERIAL, BootFiles, Disk, DiskFile, MachineSpec

pytestmark = pytest.mark.skipif(bool(NO_QEMU), reason=NO_QEMU)

INSTALLATION = "imgs"
SANDBOX = "aaaaaaaaaaaa"
GUEST_LIMIT_SECONDS = 120

STAND_IN = '''
import json, os, signal, sys, time

COUNT = "/run/starts"


def read(path):
    with open(path) as file:
        return file.read()


def states():
    """name -> state of every process"""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = read(f"/proc/{name}/stat")
        except OSError:
            continue
        found[int(name)] = words[words.rindex(")") + 2]
    return found


def main():
    starts = int(read(COUNT)) + 1 if os.path.exists(COUNT) else 1
    with open(COUNT, "w") as file:
        file.write(str(starts))
    with open("/run/uptimes", "a") as file:
        file.write(read("/proc/uptime").split()[0] + " ")
    if starts == 1:
        # An orphan that lives on, and one that ends at once; both are PID 1's now.
        for lives in (True, False):
            if os.fork() == 0:
                if os.fork() == 0:
                    if lives:
                        with open("/run/orphan", "w") as file:
                            file.write(str(os.getpid()))
                        time.sleep(600)
                    os._exit(0)
                os._exit(0)
            os.wait()
        while not os.path.exists("/run/orphan"):
            time.sleep(0.01)
        time.sleep(0.3)
        print("KILLED", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if starts == 2:
        sys.exit(3)
    import asyncio, ctypes, hashlib, socket
    with socket.create_server(("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.getsockname()).close()
    try:
        open("/opt/shared/written", "w").close()
        writable = True
    except OSError:
        writable = False
    orphan = int(read("/run/orphan"))
    print("REPORT " + json.dumps({
        "uid": os.getuid(),
        "parent": os.getppid(),
        "path": sys.path,
        "uptimes": [float(word) for word in read("/run/uptimes").split()],
        "zombies": [pid for pid, state in states().items() if state == "Z"],
        "orphan_parent": int(read(f"/proc/{orphan}/status").split("PPid:")[1].split()[0]),
        "mounts": {line.split()[1]: line.split()[2] for line in read("/proc/mounts").splitlines()},
        "tools_writable": writable,
        "tmp_mode": os.stat("/tmp").st_mode,
        "controllers": read("/sys/fs/cgroup/cgroup.controllers").split(),
        "hostname": socket.gethostname(),
        "ports": [read(f"/sys/class/virtio-ports/{name}/name").strip() for name in os.listdir("/sys/class/virtio-ports")],
        "random": os.path.exists("/dev/hwrng"),
        "sha256": hashlib.sha256(b"").hexdigest()[:8],
        "encoding": sys.getfilesystemencoding(),
    }), flush=True)
    os.kill(1, signal.SIGUSR2)
    time.sleep(600)
'''


@pytest.fixture
def folder() -> Iterator[Path]:
    # Short: sockets lie below it.
    made = Path(tempfile.mkdtemp(prefix="atl-img-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


async def _boot_files(cache: Path, agent: str) -> BootFiles:
    """Boot files of this checkout with a stand-in for the guest agent; the kernel and the unpacked Python come from the
    machine's cache."""
    own = await images_of_this_checkout().ensure_boot_files(lambda _: None)
    for part in (own.kernel.parent, own.tools.parent):
        shutil.copytree(part, cache / part.name, ignore=shutil.ignore_patterns("core-*"), dirs_exist_ok=True)
    sources = cache / "atelier"
    shutil.copytree(REPOSITORY / "src" / "atelier" / "guest_protocol", sources / "guest_protocol")
    (sources / "guest_agent").mkdir()
    for name in ("__init__.py", "program.py"):
        (sources / "guest_agent" / name).write_text("")
    (sources / "guest_agent" / "__main__.py").write_text(agent)
    return await DebianImages(cache, REPOSITORY / "images", sources).ensure_boot_files(lambda _: None)


async def _run(spec: MachineSpec, folder: Path) -> str:
    """Run the machine until it ends by itself; returns its console."""
    vmm = emulated(INSTALLATION, folder)
    await vmm.ensure_run_directory(spec.sandbox_id, spec.run_directory)
    try:
        identity = await vmm.ensure_started(spec)
        try:
            async with asyncio.timeout(GUEST_LIMIT_SECONDS):
                await vmm.wait_ended(identity)
        finally:
            console = (await vmm.console_tail(spec.run_directory, 65536)).decode(errors="replace")
            await vmm.ensure_stopped(spec.sandbox_id, spec.run_directory, identity)
    except TimeoutError:
        pytest.fail(f"the guest did not end; its console: {console}")
    finally:
        await vmm.ensure_run_directory_absent(spec.run_directory)
    return console


async def test_the_agent_runs_in_an_empty_image_is_respawned_and_orphans_are_reaped(folder: Path) -> None:
    boot = await _boot_files(folder / "cache", STAND_IN)
    spec = machine_spec(SANDBOX, INSTALLATION, boot, folder)
    spec = replace(spec, tools=Disk(TOOLS_DISK_SERIAL, DiskFile(boot.tools, "raw"), read_only=True))
    console = await _run(spec, folder)
    line = next((line for line in console.splitlines() if line.startswith("REPORT ")), None)
    assert line is not None, console
    told: dict[str, Any] = json.loads(line.removeprefix("REPORT "))
    assert told["uid"] == 0
    assert told["parent"] == 1
    assert told["orphan_parent"] == 1
    assert told["zombies"] == []
    assert len(told["uptimes"]) == 3
    assert "ended with status 137" in console
    assert "ended with status 3" in console
    assert all(entry.startswith("/opt/shared/") for entry in told["path"])
    expected = {
        "/": "ext4",
        "/opt/shared": "ext4",
        "/proc": "proc",
        "/sys": "sysfs",
        "/dev": "devtmpfs",
        "/dev/pts": "devpts",
        "/dev/shm": "tmpfs",
        "/run": "tmpfs",
        "/sys/fs/cgroup": "cgroup2",
    }
    assert told["mounts"].items() >= expected.items()
    assert not told["tools_writable"]
    assert told["tmp_mode"] & 0o7777 == 0o1777
    assert {"memory", "pids"} <= set(told["controllers"])
    assert told["hostname"] == "atelier"
    assert told["ports"] == ["atelier"]
    assert told["random"]
    assert told["sha256"] == "e3b0c442"
    assert told["encoding"] == "utf-8"
    # Said by the stand-in to PID 1, and followed: the machine ended by itself.
    assert "shutting down" in console


async def test_a_missing_disk_is_named_on_the_console_and_ends_the_machine(folder: Path) -> None:
    boot = await images_of_this_checkout().ensure_boot_files(lambda _: None)
    spec = machine_spec(SANDBOX, INSTALLATION, boot, folder)
    console = await _run(replace(spec, tools=replace(spec.tools, serial="another")), folder)
    assert "cannot boot: no disk with the serial atelier-tools" in console


async def test_a_root_disk_without_a_file_system_is_named_on_the_console(folder: Path) -> None:
    boot = await images_of_this_checkout().ensure_boot_files(lambda _: None)
    spec = machine_spec(SANDBOX, INSTALLATION, boot, folder)
    empty = folder / "empty.img"
    with empty.open("xb") as file:
        file.truncate(16 * 1024 * 1024)
    console = await _run(replace(spec, root=Disk(spec.root.serial, DiskFile(empty, "raw"))), folder)
    assert "cannot boot: the root file system on /dev/vd" in console
