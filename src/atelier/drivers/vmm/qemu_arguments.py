"""QEMU's argument list for one machine: every option and why. Pure: words and descriptor numbers in, words out.

Called by the QEMU driver and the KVM probe. Files are named by inherited descriptors only, so a confined QEMU needs no
folder of ours and no right to open one. Source of the options: qemu-system(1), 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atelier.drivers.vmm.qmp import JsonObject
from atelier.model.machine import Disk, NetworkAttachment

GUEST_PORT_NAME = "atelier"
"""The virtio-serial port that the guest agent looks for in /sys/class/virtio-ports."""

AcceleratorKind = Literal["tcg", "kvm"]

MACHINE_TYPE = "microvm,pit=off,pic=off"
"""No PIT and PIC: Debian's kernel takes its devices and interrupts from ACPI."""

NETWORK_NODE = "network"
"""What the network's host side is called in QEMU's own words."""

_GUEST_KERNEL_HZ = 250
_CODE_CACHE_MIB = 64
_MEMORY = "ram"
_EMPTY_DISK_BYTES = 1024 * 1024
LOCKED_DOWN = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class OpenDisk:
    """A disk whose files are open: ``descriptors[0]`` is ``disk.top``, then ``disk.backing`` in order. ``node``: how
    QEMU is to call the top file's block node, at most 26 bytes. ``is_device``: the top is a block device of the host's."""

    disk: Disk
    descriptors: tuple[int, ...]
    node: str
    is_device: bool = False


@dataclass(frozen=True, slots=True)
class EmptyDisk:
    """In place of a disk that is neither read nor written, since its machine never runs."""

    serial: str
    read_only: bool
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenMemory:
    """Where the guest's memory lies: in an open file, by ``shared`` written to or mapped copy-on-write."""

    descriptor: int
    shared: bool


@dataclass(frozen=True, slots=True)
class MachineDescriptors:
    """Open files of one machine. The two sockets listen already. Only one that boots has a kernel and an initramfs."""

    console: int
    control_socket: int
    guest_socket: int
    kernel: int | None = None
    initramfs: int | None = None

    @property
    def all(self) -> tuple[int, ...]:
        found = (self.console, self.control_socket, self.guest_socket, self.kernel, self.initramfs)
        return tuple(descriptor for descriptor in found if descriptor is not None)


def process_name(installation_id: str, sandbox_id: str) -> str:
    """What stands behind ``-name``: whose VMM a process is."""
    return f"atelier-{installation_id}-{sandbox_id}"


def tcg_kernel_arguments(tsc_khz: int) -> list[str]:
    """The guest kernel finds no timer to measure its counter against on ``microvm``, so the rate is told."""
    return [
        f"tsc_early_khz={tsc_khz}",
        f"lpj={tsc_khz * 1000 // _GUEST_KERNEL_HZ}",
        "tsc=reliable",
        "no_timer_check",
        # All on one emulated processor: there is nothing to leak, and each costs time on every system call.
        "mitigations=off",
        # What guards a guest's users against each other, who may all become root by sudo; it costs a fifth of a boot:
        # clearing memory as it is handed out, and asking AppArmor and TOMOYO at each file that is opened.
        "init_on_alloc=0",
        "lsm=landlock,yama",
    ]


def kernel_command_line(accelerator: AcceleratorKind, tsc_khz: int, extra: tuple[str, ...] = ()) -> str:
    arguments = [
        "console=ttyS0",
        "quiet",
        # A guest that panics or reboots ends its VMM (-no-reboot).
        "reboot=t",
        "panic=-1",
        # Devices that microvm has not got, and probing for which takes time.
        "8250.nr_uarts=1",
        "i8042.noaux",
        "i8042.nokbd",
        "pci=off",
        "random.trust_cpu=on",
        # The kernel testing its own ciphers: a fifth of an emulated boot.
        "cryptomgr.notests",
    ]
    if accelerator == "tcg":
        arguments += tcg_kernel_arguments(tsc_khz)
    return " ".join([*arguments, *extra])


def machine_arguments(
    executable: Path,
    name: str,
    *,
    accelerator: AcceleratorKind,
    vcpu_count: int,
    memory_mib: int,
    command_line: str,
    descriptors: MachineDescriptors,
    disks: tuple[OpenDisk | EmptyDisk, ...] = (),
    network: NetworkAttachment | None = None,
    network_descriptor: int | None = None,
    memory: OpenMemory | None = None,
) -> list[str]:
    """The whole argument list. ``command_line`` is the guest kernel's; a machine without a kernel waits, stopped, for
    another one's state to be loaded. ``memory`` None: of the process's own."""
    files = _DescriptorSets()
    arguments = [
        *(str(executable), "-name", name),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
        *("-sandbox", LOCKED_DOWN),
        *("-machine", f"{MACHINE_TYPE},mem-merge=off,dump-guest-core=off,memory-backend={_MEMORY}"),
        *("-object", _memory(memory_mib, memory)),
        *_processor(accelerator),
        *("-smp", str(vcpu_count), "-m", f"{memory_mib}M"),
        *_beginning(descriptors, command_line),
        *("-chardev", f"file,id=console,append=on,path={files.add(descriptors.console)}"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=control,fd={descriptors.control_socket},server=on,wait=off"),
        *("-mon", "chardev=control,mode=control"),
        *("-device", "virtio-serial-device,max_ports=2"),
        *("-chardev", f"socket,id=guest,fd={descriptors.guest_socket},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=guest,name={GUEST_PORT_NAME}"),
        *("-device", "virtio-rng-device"),
    ]
    for number, disk in enumerate(disks):
        arguments += _empty_disk(number, disk) if isinstance(disk, EmptyDisk) else _disk(disk, files)
    arguments += _network(network, network_descriptor)
    return [*arguments, *files.arguments]


class _DescriptorSets:
    """Numbers the descriptor sets by which ``/dev/fdset/N`` names an inherited file."""

    def __init__(self) -> None:
        self.arguments: list[str] = []
        self._count = 0

    def add(self, descriptor: int) -> str:
        self._count += 1
        self.arguments += ["-add-fd", f"fd={descriptor},set={self._count}"]
        return f"/dev/fdset/{self._count}"


def _processor(accelerator: AcceleratorKind) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # A code cache of 8 MiB is six times slower. One of 32 is full once bash, Python and some programs have run, which lie at
    # new addresses each time, and then everything is translated anew for 200 ms; one of 256 costs 60 MiB more a machine.
    return ["-accel", f"tcg,thread=multi,tb-size={_CODE_CACHE_MIB}", "-cpu", "max"]


def _memory(memory_mib: int, memory: OpenMemory | None) -> str:
    """Always an object of this name: by it a saved machine's memory is found again, wherever it lay."""
    size = f"id={_MEMORY},size={memory_mib}M"
    if memory is None:
        return f"memory-backend-ram,{size}"
    shared = "on" if memory.shared else "off"
    return f"memory-backend-file,{size},mem-path=/proc/self/fd/{memory.descriptor},share={shared}"


def _beginning(descriptors: MachineDescriptors, command_line: str) -> list[str]:
    if descriptors.kernel is None:
        # -S: it stays stopped when it is loaded, too, so that its network link is down before it runs.
        return ["-S", "-incoming", "defer"]
    # Opened by name, not through a descriptor set: the loader knows only names.
    kernel, initramfs = (f"/proc/self/fd/{each}" for each in (descriptors.kernel, descriptors.initramfs))
    return ["-kernel", kernel, "-initrd", initramfs, "-append", command_line]


def overlay_options(node: str, file_name: str) -> tuple[JsonObject, JsonObject]:
    """As ``blockdev-add`` takes them: file and qcow2 node of a file that is to stand over a running disk."""
    common: JsonObject = {"read-only": False, "discard": "unmap", "cache": {"direct": False, "no-flush": False}}
    file: JsonObject = {"driver": "file", "node-name": f"{node}-file", "filename": file_name, "locking": "off"}
    return (
        {**file, "aio": "threads", **common},
        # Nothing below it: what it stands over is put there by blockdev-snapshot.
        {"driver": "qcow2", "node-name": node, "file": f"{node}-file", "backing": None, **common},
    )


def _empty_disk(number: int, disk: EmptyDisk) -> list[str]:
    node, access = f"empty{number}", "on" if disk.read_only else "off"
    return [
        *("-blockdev", f"driver=null-co,node-name={node},size={_EMPTY_DISK_BYTES},read-only={access}"),
        *("-device", f"virtio-blk-device,drive={node},serial={disk.serial}"),
    ]


def _disk(open_disk: OpenDisk, files: _DescriptorSets) -> list[str]:
    """The chain of block nodes, deepest first, each a format over a file, and the device on top of it."""
    disk, name = open_disk.disk, open_disk.node
    chain = [*zip((disk.top, *disk.backing), open_disk.descriptors, strict=True)]
    arguments: list[str] = []
    below = ""
    for depth in reversed(range(len(chain))):
        file, descriptor = chain[depth]
        node = name if depth == 0 else f"{name}-b{depth}"
        driver = "host_device" if depth == 0 and open_disk.is_device else "file"
        access = "read-only=on" if depth > 0 or disk.read_only else "read-only=off,discard=unmap"
        # No locking: the files are ours alone, and a lock would need a second opening. The host's page cache is used,
        # and a flush of the guest's reaches the disk.
        cache = "cache.direct=off,cache.no-flush=off"
        arguments += [
            "-blockdev",
            f"driver={driver},node-name={node}-file,filename={files.add(descriptor)},locking=off,aio=threads,{access},{cache}",
            "-blockdev",
            f"driver={file.format},node-name={node},file={node}-file,{access},{cache}{below}",
        ]
        below = f",backing={node}"
    return [*arguments, "-device", f"virtio-blk-device,drive={name},serial={disk.serial}"]


def _network(network: NetworkAttachment | None, descriptor: int | None) -> list[str]:
    if network is None or network.kind == "none":
        return []
    if network.kind == "tap":
        if descriptor is None:
            raise ValueError("a network of kind tap needs its open TAP")
        return [
            *("-netdev", f"tap,id={NETWORK_NODE},fd={descriptor},vhost=off"),
            *("-device", f"virtio-net-device,netdev={NETWORK_NODE},mac={network.mac_address}"),
        ]
    return [
        # restrict: nothing of the host or beyond it is reached; what answers (DHCP, ping of 10.0.2.2) is QEMU itself.
        *("-netdev", f"user,id={NETWORK_NODE},restrict=on,ipv6=off"),
        *("-device", f"virtio-net-device,netdev={NETWORK_NODE},mac={network.mac_address}"),
    ]
