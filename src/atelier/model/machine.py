"""What a virtual machine consists of, as values that one driver hands to another by way of the lifecycle.

Driver kinds do not see each other: storage makes a ``Disk``, network a ``NetworkAttachment``, images a ``BootFiles``;
the lifecycle puts them into a ``MachineSpec`` and gives that to the VMM driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT_DISK_SERIAL = "atelier-root"
TOOLS_DISK_SERIAL = "atelier-tools"
"""The guest tells its disks apart by these virtio-blk serials (at most 20 bytes), not by their order."""


@dataclass(frozen=True, slots=True)
class DiskFile:
    """One file of a disk chain."""

    path: Path
    format: Literal["raw", "qcow2"]


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device of the guest: the file written to, and the read-only files behind it, nearest first."""

    serial: str
    top: DiskFile
    backing: tuple[DiskFile, ...] = ()
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class GuestAddress:
    """How the guest sets its card: IPv4 in text, all of its own installation's plan."""

    address: str
    prefix_length: int
    gateway: str
    nameserver: str


@dataclass(frozen=True, slots=True)
class NetworkAttachment:
    """How the guest's network card is connected. ``user_restricted``: QEMU's own network, with no way out and no port
    of the host reached. ``tap``: a TAP, which the network driver hands over open (``NetworkDriver.opened``)."""

    kind: Literal["user_restricted", "tap", "none"]
    mac_address: str = ""
    guest: GuestAddress | None = None


@dataclass(frozen=True, slots=True)
class BootFiles:
    """Guest kernel, initramfs and tools image; each named by its content and never rewritten."""

    kernel: Path
    initramfs: Path
    tools: Path
    kernel_release: str
    tools_id: str


@dataclass(frozen=True, slots=True)
class VolumeRequest:
    """What storage needs to make a sandbox's root disk. ``base``: an image's file, or the top of a ``SnapshotDisk``."""

    sandbox_id: str
    base: DiskFile
    size_mib: int


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """The root disk of a snapshot, which volumes are made over. ``used_bytes``: what its own file occupies;
    ``checksum``: that file's SHA-256 in hexadecimal."""

    disk: Disk
    used_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """Everything a VMM driver needs to start one machine. ``run_directory`` is this sandbox's own
    (``RunLayout.vmm_directory``): sockets and console of the VMM lie in it."""

    sandbox_id: str
    installation_id: str
    vcpu_count: int
    memory_mib: int
    boot: BootFiles
    root: Disk
    tools: Disk
    network: NetworkAttachment
    run_directory: Path


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be mistaken for another after its pid was used again or the host rebooted.

    ``start_time_ticks`` is field 22 of ``/proc/<pid>/stat``; ``boot_id`` is ``/proc/sys/kernel/random/boot_id``.
    """

    pid: int
    start_time_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class GuestEndpoint:
    """Where the host side of the guest channel begins.

    ``virtio_serial``: a unix socket of the VMM that carries the multiplexed byte stream (the gateway speaks it);
    ``vsock``: Firecracker's unix socket, which answers ``CONNECT <port>`` itself;
    ``fake``: the fake guest, in the manager's own memory.
    """

    kind: Literal["virtio_serial", "vsock", "fake"]
    socket_path: Path
