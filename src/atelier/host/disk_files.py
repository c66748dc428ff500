"""What disk image files say of themselves, read without starting a program.

Called by storage and VMM drivers. Only files of our own making are read here; a guest's disk is never parsed further
than its first 32 bytes.
"""

from __future__ import annotations

from atelier.model.errors import HostError
from atelier.model.machine import DiskFile

_QCOW2_MAGIC = b"QFI\xfb"


def virtual_size_bytes(disk: DiskFile) -> int:
    """Size of the disk that the file holds.

    Raises HostError (``disk_file_missing``, ``disk_file_damaged``). Source: QEMU docs/interop/qcow2.txt.
    """
    try:
        if disk.format == "raw":
            return disk.path.stat().st_size
        with disk.path.open("rb") as file:
            header = file.read(32)
    except FileNotFoundError as error:
        raise HostError(
            f"the disk file {disk.path} is missing", code="disk_file_missing", hint="if it is an image, build it again"
        ) from error
    if len(header) < 32 or header[:4] != _QCOW2_MAGIC:
        raise HostError(f"{disk.path} is not a qcow2 file", code="disk_file_damaged")
    return int.from_bytes(header[24:32], "big")
