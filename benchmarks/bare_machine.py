"""Bare QEMU: the same kernel, initramfs, tools image, disk overlay and options as a sandbox's, and nothing around it."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from atelier.drivers.network.addresses import mac_address_of
from atelier.drivers.vmm.qemu_arguments import (
    GUEST_PORT_NAME,
    AcceleratorKind,
    OpenMemory,
    kernel_command_line,
    machine_arguments,
)
from atelier.drivers.vmm.qemu_disks import open_disk
from atelier.drivers.vmm.run_folder import RunFolder, opened_machine
from atelier.host.tsc import cached_tsc_khz
from atelier.model.image import Image
from atelier.model.machine import (
    ROOT_DISK_SERIAL,
    TOOLS_DISK_SERIAL,
    BootFiles,
    Disk,
    DiskFile,
    NetworkAttachment,
)
from atelier.model.sandbox import DEFAULT_DISK_MIB, DEFAULT_MEMORY_MIB, DEFAULT_VCPU_COUNT

QEMU = "/usr/bin/qemu-system-x86_64"
RAW_PORT_NAME = "raw"


@dataclass(frozen=True)
class Ingredients:
    """What both sides boot."""

    boot: BootFiles
    image: Image
    accelerator: AcceleratorKind
    cache_dir: Path


@dataclass(frozen=True)
class SavedSide:
    """What a restored machine has instead of an image and a kernel: what its disk stands over, nearest first, the tools
    image that its memory belongs to, and its memory where that is mapped (None: it comes with the state)."""

    below: tuple[DiskFile, ...]
    tools: Path
    memory: OpenMemory | None


@dataclass(frozen=True)
class BareMachine:
    folder: RunFolder
    raw_socket: Path
    """A second virtio-serial port, without any framing."""
    pid: int

    @property
    def overlay(self) -> Path:
        """The disk that it writes to."""
        return self.folder.root / "root.qcow2"

    def await_socket(self) -> None:
        deadline = time.monotonic() + 30
        while not self.raw_socket.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"QEMU did not come up: {self.folder.stderr.read_text(errors='replace')}")
            time.sleep(0.005)


@contextlib.contextmanager
def bare_machine(
    folder: Path,
    ingredients: Ingredients,
    *,
    with_raw_port: bool = False,
    network: NetworkAttachment | None = None,
    network_descriptor: int | None = None,
    saved: SavedSide | None = None,
    memory_mib: int = DEFAULT_MEMORY_MIB,
) -> Generator[BareMachine]:
    """Make an overlay, start QEMU, and end both with the block. ``with_raw_port`` adds the one thing that a sandbox's
    machine has not got. Without a ``network`` it has a card that reaches nothing. With ``saved`` it waits to be loaded
    (``bare_restore``) instead of booting."""
    folder.mkdir(mode=0o700, parents=True)
    run_folder, raw_socket = RunFolder(folder), folder / "raw.sock"
    overlay = folder / "root.qcow2"
    below = saved.below if saved else (DiskFile(ingredients.image.path, "raw"),)
    subprocess.run(
        [
            *("qemu-img", "create", "-q", "-u", "-f", "qcow2"),
            *("-F", below[0].format, "-b", str(below[0].path), str(overlay), f"{DEFAULT_DISK_MIB}M"),
        ],
        check=True,
    )
    root = Disk(ROOT_DISK_SERIAL, DiskFile(overlay, "qcow2"), below)
    tools_file = saved.tools if saved else ingredients.boot.tools
    tools = Disk(TOOLS_DISK_SERIAL, DiskFile(tools_file, "raw"), read_only=True)
    tsc_khz = 0
    if ingredients.accelerator == "tcg":
        tsc_khz = cached_tsc_khz(ingredients.cache_dir / "tsc.json")
    with contextlib.ExitStack() as stack:
        descriptors = stack.enter_context(opened_machine(run_folder, None if saved else ingredients.boot))
        disks = [open_disk(disk, stack) for disk in (root, tools)]
        arguments = machine_arguments(
            Path(QEMU),
            f"bench-{folder.name}",
            accelerator=ingredients.accelerator,
            vcpu_count=DEFAULT_VCPU_COUNT,
            memory_mib=memory_mib,
            command_line=kernel_command_line(ingredients.accelerator, tsc_khz),
            descriptors=descriptors,
            disks=tuple(disks),
            network=network or NetworkAttachment("user_restricted", mac_address_of("benchmarkaaa")),
            network_descriptor=network_descriptor,
            memory=saved.memory if saved else None,
        )
        if with_raw_port:
            _add_raw_port(arguments, raw_socket)
        inherited = [*descriptors.all, *(number for disk in disks for number in disk.descriptors)]
        if network_descriptor is not None:
            inherited.append(network_descriptor)
        if saved and saved.memory:
            inherited.append(saved.memory.descriptor)
        with run_folder.stderr.open("wb") as stderr:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, pass_fds=inherited
            )
    try:
        yield BareMachine(run_folder, raw_socket, process.pid)
    finally:
        process.kill()
        process.wait()
        for name in folder.iterdir():
            name.unlink()
        folder.rmdir()


def _add_raw_port(arguments: list[str], raw_socket: Path) -> None:
    arguments[arguments.index("virtio-serial-device,max_ports=2")] = "virtio-serial-device,max_ports=3"
    behind_agent = arguments.index(f"virtserialport,chardev=guest,name={GUEST_PORT_NAME}") + 1
    arguments[behind_agent:behind_agent] = [
        *("-chardev", f"socket,id=raw,path={raw_socket},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=raw,name={RAW_PORT_NAME}"),
    ]
