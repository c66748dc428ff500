"""What Firecracker is asked for: one class per resource, with the vendor's own names, and where it is put.

Called by the Firecracker driver. Pure. Source: Firecracker src/firecracker/swagger/firecracker.yaml; tests hold every
request against that document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar, Literal

ROOT_DRIVE = "root"
TOOLS_DRIVE = "tools"
NETWORK_INTERFACE = "eth0"
GUEST_CID = 3
"""Of every machine: each has a vsock of its own."""


class Resource:
    """Something that Firecracker keeps under ``path``."""

    place: ClassVar[str] = ""
    """Where there is one of it."""

    @property
    def path(self) -> str:
        return self.place

    def body(self) -> dict[str, Any]:
        """As JSON takes it, without what is None."""
        assert is_dataclass(self)
        return _without_none(asdict(self))


@dataclass(frozen=True, slots=True)
class TokenBucket:
    size: int
    refill_time: int
    """In ms."""


_NO_BUCKET = TokenBucket(0, 0)


@dataclass(frozen=True, slots=True)
class RateLimiter:
    bandwidth: TokenBucket | None = None
    """Tokens are bytes."""
    ops: TokenBucket | None = None


def rate_limiter(bytes_per_second: int | None, operations_per_second: int | None = None) -> RateLimiter | None:
    """None: no limit."""
    if bytes_per_second is None and operations_per_second is None:
        return None
    return RateLimiter(_per_second(bytes_per_second), _per_second(operations_per_second))


def replacing(limiter: RateLimiter | None) -> RateLimiter:
    """The same in place of whatever rate there is. A bucket that is not named stays as it is, one of no size is gone.
    Source: Firecracker src/vmm/src/rate_limiter/mod.rs: TokenBucket::new, BucketUpdate."""
    given = limiter or RateLimiter()
    return RateLimiter(given.bandwidth or _NO_BUCKET, given.ops or _NO_BUCKET)


def _per_second(tokens: int | None) -> TokenBucket | None:
    return None if tokens is None else TokenBucket(size=tokens, refill_time=1000)


@dataclass(frozen=True)
class MachineConfiguration(Resource):
    vcpu_count: int
    mem_size_mib: int
    smt: bool = False
    cpu_template: str | None = None
    track_dirty_pages: bool = False
    place: ClassVar[str] = "/machine-config"


@dataclass(frozen=True)
class CpuConfig(Resource):
    """A CPU template of one's own, as the vendor's document describes it."""

    template: Mapping[str, Any]
    place: ClassVar[str] = "/cpu-config"

    def body(self) -> dict[str, Any]:
        return dict(self.template)


@dataclass(frozen=True)
class BootSource(Resource):
    kernel_image_path: str
    initrd_path: str
    boot_args: str
    place: ClassVar[str] = "/boot-source"


@dataclass(frozen=True)
class Drive(Resource):
    drive_id: str
    path_on_host: str
    is_root_device: bool
    is_read_only: bool
    cache_type: Literal["Unsafe", "Writeback"]
    rate_limiter: RateLimiter | None = None

    @property
    def path(self) -> str:
        return f"/drives/{self.drive_id}"


@dataclass(frozen=True)
class PartialDrive(Resource):
    drive_id: str
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None

    @property
    def path(self) -> str:
        return f"/drives/{self.drive_id}"


@dataclass(frozen=True)
class NetworkInterface(Resource):
    iface_id: str
    host_dev_name: str
    guest_mac: str
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None

    @property
    def path(self) -> str:
        return f"/network-interfaces/{self.iface_id}"


@dataclass(frozen=True)
class Vsock(Resource):
    guest_cid: int
    uds_path: str
    place: ClassVar[str] = "/vsock"


@dataclass(frozen=True)
class EntropyDevice(Resource):
    rate_limiter: RateLimiter | None = None
    place: ClassVar[str] = "/entropy"


@dataclass(frozen=True)
class Balloon(Resource):
    amount_mib: int
    deflate_on_oom: bool
    stats_polling_interval_s: int
    place: ClassVar[str] = "/balloon"


@dataclass(frozen=True)
class BalloonUpdate(Resource):
    amount_mib: int
    place: ClassVar[str] = "/balloon"


@dataclass(frozen=True)
class Metrics(Resource):
    metrics_path: str
    place: ClassVar[str] = "/metrics"


@dataclass(frozen=True)
class InstanceActionInfo(Resource):
    action_type: Literal["FlushMetrics", "InstanceStart", "SendCtrlAltDel"]
    place: ClassVar[str] = "/actions"


@dataclass(frozen=True)
class Vm(Resource):
    state: Literal["Paused", "Resumed"]
    place: ClassVar[str] = "/vm"


@dataclass(frozen=True)
class SnapshotCreateParams(Resource):
    mem_file_path: str
    snapshot_path: str
    snapshot_type: Literal["Full"] = "Full"
    place: ClassVar[str] = "/snapshot/create"


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    backend_path: str
    backend_type: Literal["File"] = "File"


@dataclass(frozen=True, slots=True)
class NetworkOverride:
    iface_id: str
    host_dev_name: str


@dataclass(frozen=True)
class SnapshotLoadParams(Resource):
    snapshot_path: str
    mem_backend: MemoryBackend
    resume_vm: bool
    network_overrides: tuple[NetworkOverride, ...] = ()
    clock_realtime: bool | None = None
    place: ClassVar[str] = "/snapshot/load"


def guest_command_line() -> str:
    """The guest kernel's. Firecracker itself adds its devices and the root disk."""
    return " ".join(
        [
            "console=ttyS0",
            "quiet",
            # A guest that panics or reboots ends its VMM, by the keyboard controller, which is all there is for it.
            "reboot=k",
            "panic=-1",
            "8250.nr_uarts=1",
            "i8042.noaux",
            "i8042.nomux",
            "i8042.dumbkbd",
            "random.trust_cpu=on",
            "cryptomgr.notests",
            # Firecracker's disks have serials of its own making.
            "atelier.disks=in-order",
        ]
    )


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(each) for name, each in value.items() if each is not None}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, (list, tuple)):
        return [_without_none(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    return value
