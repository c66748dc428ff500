"""What disk image files say of themselves, read without starting a program.

Called by storage and VMM drivers, and by the manager's backup. Of a guest's disk only the header is read. A VMM that was
taken over can write there: what a header says of other files must be checked by whoever opens them.
"""

from __future__ import annotations

import os
from pathlib import Path

from atelier.model.errors import HostError
from atelier.model.machine import DiskFile

_QCOW2_MAGIC = b"QFI\xfb"
_BACKING_NAME_MAX_BYTES = 1023
_MIN_CLUSTER_BITS, _MAX_CLUSTER_BITS = 9, 21


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
        raise _not_qcow2(disk.path)
    return int.from_bytes(header[24:32], "big")


def find_backing_file(overlay: Path) -> Path | None:
    """The file that a qcow2 file stands over, as its header names it; None if it stands alone.

    Raises HostError (``disk_file_damaged``). Source: QEMU docs/interop/qcow2.txt.
    """
    with overlay.open("rb") as file:
        offset, length, _ = _find_backing_name(overlay, file.read(32))
        if offset == 0:
            return None
        file.seek(offset)
        name = file.read(length)
    if len(name) != length or b"\0" in name:
        raise _damaged(overlay)
    return overlay.parent / os.fsdecode(name)


def set_backing_file(overlay: Path, backing_file: Path) -> None:
    """Let a qcow2 file, which must not be in use, stand over the same content under another name.

    Only the name in the header changes, as by ``qemu-img rebase -u``, which would follow all that the header names.
    """
    name = os.fsencode(backing_file)
    with overlay.open("r+b") as file:
        offset, length, cluster_bytes = _find_backing_name(overlay, file.read(32))
        room = cluster_bytes - offset
        if offset == 0 or len(name) > min(room, _BACKING_NAME_MAX_BYTES):
            raise HostError(
                f"the header of {overlay} has no room for the name {backing_file}",
                code="path_too_long",
                hint="choose a data folder with a shorter path",
            )
        file.seek(offset)
        # Source: the same: the name is the last thing in the header, and the header is the first cluster.
        file.write(name.ljust(min(max(length, len(name)), room), b"\0"))
        file.seek(16)
        file.write(len(name).to_bytes(4, "big"))
        file.flush()
        os.fsync(file.fileno())


def _find_backing_name(overlay: Path, header: bytes) -> tuple[int, int, int]:
    """Offset (0: none) and length of the name, and the bytes of a cluster."""
    if len(header) < 32 or header[:4] != _QCOW2_MAGIC:
        raise _not_qcow2(overlay)
    offset, length = int.from_bytes(header[8:16], "big"), int.from_bytes(header[16:20], "big")
    cluster_bits = int.from_bytes(header[20:24], "big")
    if not _MIN_CLUSTER_BITS <= cluster_bits <= _MAX_CLUSTER_BITS or length > _BACKING_NAME_MAX_BYTES:
        raise _damaged(overlay)
    if offset and (offset < 32 or offset + length > 1 << cluster_bits):
        raise _damaged(overlay)
    return offset, length, 1 << cluster_bits


def _not_qcow2(path: Path) -> HostError:
    return HostError(f"{path} is not a qcow2 file", code="disk_file_damaged")


def _damaged(overlay: Path) -> HostError:
    return HostError(f"the header of {overlay} is damaged", code="disk_file_damaged")
