"""What a virtual machine consists of, as values that one driver hands to another by way of the lifecycle.

Driver kinds do not see each other: storage makes a ``Disk``, network a ``NetworkAttachment``, images a ``BootFiles``;
the lifecycle puts them into a ``MachineSpec`` and gives that to the VMM driver.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

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
    of the host reached. ``tap``: a TAP, which the network driver hands over open (``NetworkDriver.opened``), or which a
    VMM opens itself by ``device_name``, in the namespace that it is in."""

    kind: Literal["user_restricted", "tap", "none"]
    mac_address: str = ""
    guest: GuestAddress | None = None
    device_name: str = ""


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
class MemoryStream:
    """All of a machine, its memory included, as one stream: it is loaded into memory of the new machine's own."""

    path: Path


@dataclass(frozen=True, slots=True)
class MemoryImage:
    """A machine as a memory file, which many machines map privately (copy-on-write), and the small state of all else."""

    memory: Path
    state: Path


@dataclass(frozen=True, slots=True)
class SavedMachine:
    """What saving came to. ``stopped_ms``: from the moment the machine stood still to the end of its stream.
    ``vmm_version``: of the VMM that it ran in, which may be older than what is installed by now."""

    stopped_ms: float
    size_bytes: int
    vmm_version: str


_TSC_TOLERANCE = 0.001
"""The rate is measured anew at each boot of the host, and each measurement is off by some millionths."""


@dataclass(frozen=True, slots=True)
class MachineStamp:
    """What must be equal where a saved machine is to go on; its kernel and its sizes are told by whoever saved it.

    ``cpu_flags`` is a hash, empty under emulation, where the guest sees none of the host's. ``tsc_khz`` is 0 where the
    VMM hands the counter's rate over by itself. ``format`` counts the driver's own arrangements of devices.
    """

    vmm: str
    vmm_version: str
    machine_type: str
    cpu_model: str
    cpu_flags: str
    tsc_khz: int
    network_kind: str
    format: int

    def difference(self, other: MachineStamp) -> str:
        """Name of the first field in which the two do not fit; empty if they do."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name == "tsc_khz":
                if not math.isclose(mine, theirs, rel_tol=_TSC_TOLERANCE):
                    return field.name
            elif mine != theirs:
                return field.name
        return ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> MachineStamp:
        """Raises KeyError, ValueError or TypeError for what ``to_json`` has not made."""
        return cls(
            vmm=str(value["vmm"]),
            vmm_version=str(value["vmm_version"]),
            machine_type=str(value["machine_type"]),
            cpu_model=str(value["cpu_model"]),
            cpu_flags=str(value["cpu_flags"]),
            tsc_khz=int(value["tsc_khz"]),
            network_kind=str(value["network_kind"]),
            format=int(value["format"]),
        )


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """Everything a VMM driver needs to start one machine. ``run_directory`` is this sandbox's own
    (``RunLayout.vmm_directory``): sockets and console of the VMM lie in it. ``restore_from``: the machine goes on from
    there, its network link down; None: it boots its kernel."""

    sandbox_id: str
    installation_id: str
    vcpu_count: int
    memory_mib: int
    boot: BootFiles
    root: Disk
    tools: Disk
    network: NetworkAttachment
    run_directory: Path
    restore_from: MemoryStream | MemoryImage | None = None


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
