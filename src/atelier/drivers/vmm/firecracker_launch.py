"""Brings one Firecracker from its jail to a running guest: jail, process, then request after request.

Called by the Firecracker driver. It knows the order that Firecracker wants; a machine that fails half-way is the
driver's to end.
"""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atelier.drivers.vmm.firecracker_api import FirecrackerApi
from atelier.drivers.vmm.firecracker_config import (
    GUEST_CID,
    NETWORK_INTERFACE,
    ROOT_DRIVE,
    TOOLS_DRIVE,
    Balloon,
    BootSource,
    CpuConfig,
    Drive,
    EntropyDevice,
    InstanceActionInfo,
    MachineConfiguration,
    MemoryBackend,
    Metrics,
    NetworkInterface,
    NetworkOverride,
    RateLimiter,
    Resource,
    SnapshotLoadParams,
    Vsock,
    guest_command_line,
)
from atelier.drivers.vmm.firecracker_stream import read_parts
from atelier.drivers.vmm.firecracker_version import FirecrackerVersion, check_kernel
from atelier.host import processes
from atelier.host.files import write_atomically
from atelier.model.errors import CommandError, VmmError
from atelier.model.jail import (
    JAIL_DISK,
    JAIL_GUEST_SOCKET,
    JAIL_INITRAMFS,
    JAIL_KERNEL,
    JAIL_LOG,
    JAIL_MEMORY,
    JAIL_METRICS,
    JAIL_STATE,
    JAIL_TOOLS,
    JailLink,
    JailRequest,
    JailStart,
)
from atelier.model.machine import MachineSpec, MemoryImage, MemoryStream, ProcessIdentity
from atelier.model.machine_limits import ProcessorAndMemoryLimits
from atelier.model.sandbox import MAX_DISK_MIB

_MIB = 1024 * 1024
_VMM_MEMORY_MIB = 128
"""What the VMM itself may take beside its guest's memory; the specification says 5. What it writes to files counts too,
as long as it cannot be thrown out."""
_VMM_TASKS = 16
_STATISTICS_SECONDS = 5
_API_SECONDS = 30.0
_LOOK_AGAIN_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class MachineChoices:
    """What is the same for all machines here. ``disk_rate``, ``network_rate``: of each one's root disk, and of its card
    in either direction. ``cpu_template``: the name of one of Firecracker's own; ``cpu_config``: one in full."""

    disk_rate: RateLimiter | None = None
    network_rate: RateLimiter | None = None
    cpu_template: str = ""
    cpu_config: Mapping[str, Any] = field(default_factory=dict[str, Any])


def jail_request(spec: MachineSpec, machine_id: str, user_id: int) -> JailRequest:
    """Raises VmmError (``disk_not_raw``, ``kernel_not_elf``, ``no_tap``, ``restore_failed``)."""
    if spec.root.top.format != "raw" or spec.root.backing:
        raise VmmError(
            f"the disk of sandbox {spec.sandbox_id} is no raw volume, which is all that Firecracker takes",
            code="disk_not_raw",
            hint="set the storage to LVM thin, or the VMM to QEMU",
        )
    if spec.network.kind == "user_restricted" or (spec.network.kind == "tap" and not spec.network.device_name):
        raise VmmError(
            f"sandbox {spec.sandbox_id} has no TAP that Firecracker could open",
            code="no_tap",
            hint="set ATELIER_NETWORK=bridge and ATELIER_NETWORK_HOME=host, or the VMM to QEMU",
        )
    links = [JailLink(spec.tools.top.path, JAIL_TOOLS)]
    match spec.restore_from:
        case None:
            check_kernel(spec.boot.kernel)
            links += [JailLink(spec.boot.kernel, JAIL_KERNEL), JailLink(spec.boot.initramfs, JAIL_INITRAMFS)]
        case MemoryImage(memory, state):
            _check_memory(spec, memory)
            links += [JailLink(memory, JAIL_MEMORY), JailLink(state, JAIL_STATE)]
        case MemoryStream(path):
            links += [JailLink(path, JAIL_MEMORY), JailLink(unpacked_state(path), JAIL_STATE)]
            _unpack_state(spec, path)
    for link in links:
        _let_read(spec, link.source)
    tap = spec.network.device_name if spec.network.kind == "tap" else ""
    return JailRequest(
        machine_id,
        user_id,
        tuple(links),
        spec.root.top.path,
        (JAIL_LOG, JAIL_METRICS),
        tap,
        link_up=spec.restore_from is None,
    )


def jail_start(spec: MachineSpec, machine_id: str, user_id: int, console: Path) -> JailStart:
    memory_bytes = (spec.memory_mib + _VMM_MEMORY_MIB) * _MIB
    # It writes its memory into a file when it is saved. A disk that is a file may grow to what any disk may.
    is_device = stat.S_ISBLK(spec.root.top.path.stat().st_mode)
    file_bytes = memory_bytes if is_device else max(memory_bytes, MAX_DISK_MIB * _MIB)
    limits = ProcessorAndMemoryLimits(spec.vcpu_count, memory_bytes, spec.vcpu_count + _VMM_TASKS)
    return JailStart(machine_id, user_id, console, limits, file_bytes)


def boot_requests(spec: MachineSpec, choices: MachineChoices) -> Sequence[Resource]:
    """All that is put before ``InstanceStart``, and that, in order."""
    requests: list[Resource] = [
        Metrics(f"/{JAIL_METRICS}"),
        MachineConfiguration(spec.vcpu_count, spec.memory_mib, cpu_template=choices.cpu_template or None),
        BootSource(f"/{JAIL_KERNEL}", f"/{JAIL_INITRAMFS}", guest_command_line()),
        # Root first: the guest takes them in this order. Writeback: what the guest flushes is on the disk.
        Drive(ROOT_DRIVE, f"/{JAIL_DISK}", True, False, "Writeback", choices.disk_rate),
        Drive(TOOLS_DRIVE, f"/{JAIL_TOOLS}", False, True, "Unsafe"),
        Vsock(GUEST_CID, f"/{JAIL_GUEST_SOCKET}"),
        EntropyDevice(),
        # Inflated by nobody yet; the guest's own need comes first, whatever is asked of it.
        Balloon(amount_mib=0, deflate_on_oom=True, stats_polling_interval_s=_STATISTICS_SECONDS),
    ]
    if choices.cpu_config:
        requests.append(CpuConfig(choices.cpu_config))
    if spec.network.kind == "tap":
        rate = choices.network_rate
        requests.append(
            NetworkInterface(NETWORK_INTERFACE, spec.network.device_name, spec.network.mac_address, rate, rate)
        )
    return [*requests, InstanceActionInfo("InstanceStart")]


def restore_requests(spec: MachineSpec, version: FirecrackerVersion) -> Sequence[Resource]:
    """All that loads a saved machine; it stands still then."""
    tap = spec.network.device_name if spec.network.kind == "tap" else ""
    return [
        Metrics(f"/{JAIL_METRICS}"),
        SnapshotLoadParams(
            f"/{JAIL_STATE}",
            MemoryBackend(f"/{JAIL_MEMORY}"),
            resume_vm=False,
            network_overrides=(NetworkOverride(NETWORK_INTERFACE, tap),) if tap else (),
            clock_realtime=True if version.keeps_clock else None,
        ),
    ]


async def wait_for_api(api: FirecrackerApi, identity: ProcessIdentity, grant: Callable[[], Awaitable[None]]) -> None:
    """Until it answers. ``grant`` is asked for until then: the jailer takes the jail for the machine's user alone, and
    Firecracker makes its socket after that. Raises VmmError when the process ends, or takes too long."""
    ending = asyncio.create_task(processes.wait_ended(identity))
    try:
        async with asyncio.timeout(_API_SECONDS):
            while True:
                await grant()
                try:
                    await api.state()
                    return
                except VmmError as error:
                    if error.code != "firecracker_gone":
                        raise
                await asyncio.wait([ending], timeout=_LOOK_AGAIN_SECONDS)
                if ending.done():
                    raise VmmError("the VMM ended before it could be asked for anything", code="firecracker_gone")
    except TimeoutError as error:
        raise VmmError(
            f"Firecracker did not open its API within {_API_SECONDS:g} s",
            code="firecracker_timeout",
            hint="the host may be overloaded, or the VMM hangs; its log may tell",
        ) from error
    finally:
        ending.cancel()


def start_failure(spec: MachineSpec, error: VmmError | CommandError, said: str) -> VmmError:
    """``said``: what it wrote itself, which tells more than that it is gone."""
    is_gone = error.code in ("firecracker_gone", "command_failed")
    reason = f"{error.message}: {said}" if said and is_gone else error.message
    if spec.restore_from is not None:
        return restore_failure(spec, reason)
    return VmmError(
        f"Firecracker did not start the machine of sandbox {spec.sandbox_id}: {reason}",
        code=error.code,
        hint=error.hint or "see 'atelier doctor'",
    )


def _check_memory(spec: MachineSpec, memory: Path) -> None:
    try:
        size_bytes = memory.stat().st_size
    except OSError as error:
        raise restore_failure(spec, f"{memory}: {error.strerror}") from error
    if size_bytes != spec.memory_mib * _MIB:
        raise restore_failure(spec, f"{memory} has {size_bytes} bytes")


def unpacked_state(stream: Path) -> Path:
    """Where a stream's state lies while a jail is made: beside it, as it has to be on the same file system."""
    return stream.with_name(f"{stream.name}.state")


def _unpack_state(spec: MachineSpec, stream: Path) -> None:
    try:
        parts = read_parts(stream)
    except (OSError, ValueError) as error:
        raise restore_failure(spec, f"{stream}: {error}") from error
    if parts.memory_bytes != spec.memory_mib * _MIB:
        raise restore_failure(spec, f"{stream} is of a machine with {parts.memory_bytes // _MIB} MiB")
    write_atomically(unpacked_state(stream), parts.state, mode=0o444, durable=False)


def _let_read(spec: MachineSpec, path: Path) -> None:
    """For the machine's user to read through its jail; nobody else passes the manager's folders."""
    try:
        if not path.stat().st_mode & stat.S_IROTH:
            path.chmod(0o444)
    except OSError as error:
        if spec.restore_from is not None:
            raise restore_failure(spec, f"{path}: {error.strerror}") from error
        raise VmmError(
            f"the machine cannot be started: {path}: {error.strerror}",
            hint="an image or volume was removed or is another user's; see 'atelier doctor'",
        ) from error


def restore_failure(spec: MachineSpec, why: str) -> VmmError:
    return VmmError(
        f"Firecracker could not go on with the saved machine of sandbox {spec.sandbox_id}: {why}",
        code="restore_failed",
        hint="what was saved is damaged, or another Firecracker's; start the sandbox from its disk",
    )
