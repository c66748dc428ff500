"""Sees to it that the tools image is mounted: whoever is root in the guest may have unmounted it since.

Called by ``control`` after a restore. The agent itself lives on meanwhile: what it runs from stays mapped and open, and
what it still needs here it has imported before (``program`` loads the rest a second after the start).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from typing import Final

from atelier.guest_protocol.connect import ConnectError

MOUNT_POINT: Final = "/opt/shared"
SERIAL: Final = "atelier-tools"

DISKS_IN_ORDER: Final = "atelier.disks=in-order"
"""What the kernel's command line says where the VMM gives its disks no serials of ours: root is the first disk, the
tools are on the second."""
_SECOND_DISK: Final = "vdb"

_BLOCK_DEVICES: Final = "/sys/block"
# Source: mount(2), Linux include/uapi/linux/mount.h.
_MS_RDONLY: Final = 1
_MS_NOATIME: Final = 1024


def ensure_mounted() -> None:
    """Mount it at its place if something else, or nothing, is there. Raises ConnectError."""
    name = _find_disk() if DISKS_IN_ORDER not in _read("/proc/cmdline").split() else _SECOND_DISK
    if name is None:
        raise ConnectError("failed_precondition", f"the guest has no disk with the serial {SERIAL}")
    try:
        major, minor = (int(word) for word in _read(f"{_BLOCK_DEVICES}/{name}/dev").split(":"))
        device = os.makedev(major, minor)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(MOUNT_POINT).st_dev == device:
                return
        os.makedirs(MOUNT_POINT, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mknod(f"/dev/{name}", stat.S_IFBLK | 0o600, device)
        _mount(f"/dev/{name}")
    except OSError as error:
        raise ConnectError("internal", f"cannot mount the tools image: {error}") from None


def _find_disk() -> str | None:
    for name in sorted(os.listdir(_BLOCK_DEVICES)):
        with contextlib.suppress(OSError):
            if _read(f"{_BLOCK_DEVICES}/{name}/serial").strip() == SERIAL:
                return name
    return None


def _mount(device: str) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(_MS_RDONLY | _MS_NOATIME)
    if library.mount(device.encode(), MOUNT_POINT.encode(), b"ext4", flags, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), MOUNT_POINT)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
