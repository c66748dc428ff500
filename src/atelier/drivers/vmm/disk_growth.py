"""How large a disk's file may become, and growing a disk of a running QEMU: first that limit, then the disk.

Called by the QEMU driver. Source: QEMU qapi/block-core.json (block_resize).
"""

from __future__ import annotations

from atelier.drivers.vmm.qemu_disks import find_disk, is_device
from atelier.drivers.vmm.qmp import QmpConnection
from atelier.host.process_limits import highest_inherited_file_size, raise_file_size_limit
from atelier.model.errors import InvalidRequestError
from atelier.model.machine import ProcessIdentity
from atelier.model.sandbox import MAX_DISK_MIB

_MIB = 1024 * 1024


def file_size_limits(disk_bytes: int, *, may_raise_hard_limits: bool) -> tuple[int, int]:
    """(soft, hard) limit for the files of a VMM with this disk.

    Where the manager may raise hard limits both are what the disk needs. Else the hard one leaves room for the largest
    disk there can be: QEMU's own sandbox does not keep it from raising its soft limit (``resourcecontrol`` denies
    scheduling and priorities, not setrlimit), so there a QEMU that was broken out of is bound by the higher one.
    """
    needed_bytes = _largest_file_bytes(disk_bytes)
    if may_raise_hard_limits:
        return needed_bytes, needed_bytes
    ceiling_bytes = max(needed_bytes, _largest_file_bytes(MAX_DISK_MIB * _MIB))
    inherited_bytes = highest_inherited_file_size()
    if inherited_bytes is not None:
        ceiling_bytes = min(ceiling_bytes, inherited_bytes)
    return min(needed_bytes, ceiling_bytes), ceiling_bytes


def _largest_file_bytes(disk_bytes: int) -> int:
    """What the file of a disk can grow to: its content, the qcow2 tables (1/8192 and 1/32768 of it), room to spare."""
    return disk_bytes + disk_bytes // 1000 + 64 * _MIB


async def grow_disk(control: QmpConnection, identity: ProcessIdentity, serial: str, size_bytes: int) -> None:
    """Have the disk with this serial at ``size_bytes``.

    Raises InvalidRequestError (``disk_cannot_shrink``), HostError (``limit_not_raised``), VmmError.
    """
    node, present_bytes = await find_disk(control, serial)
    if is_device(node):
        # Its storage has grown it, to a whole number of its own blocks; QEMU looks how large it is.
        size_bytes = max(size_bytes, present_bytes)
    if size_bytes < present_bytes:
        raise InvalidRequestError(
            f"the disk has {present_bytes // _MIB} MiB and cannot shrink to {size_bytes // _MIB} MiB",
            code="disk_cannot_shrink",
            hint="a disk only grows",
        )
    # Also where the disk has its size already: a manager may have died between the two.
    await raise_file_size_limit(identity, _largest_file_bytes(size_bytes))
    # And also at its size: the guest of a restored machine still knows the size that its parent's disk had.
    await control.execute("block_resize", {"node-name": node, "size": size_bytes})
