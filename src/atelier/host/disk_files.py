"""What disk image files say of themselves, read without starting a program.

Called by storage and VMM drivers, and by the manager's backup. Only headers are read, never what a guest wrote: a guest
writes to the disk inside the file. A VMM that was taken over can write there, so lengths are bounded, and what a header
says of other files must be checked by whoever opens them. Source: QEMU docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from atelier.model.errors import HostError
from atelier.model.machine import DiskFile

_QCOW2_MAGIC = b"QFI\xfb"
_HEADER_BYTES = 4096
"""The header, its extensions and the backing file's name lie in the first cluster; ours take far less of it."""
_SHORTEST_HEADER_BYTES = 72
_BACKING_FORMAT_EXTENSION = 0xE2792ACA
_BACKING_NAME_MAX_BYTES = 1023
_INCOMPATIBLE_FEATURES_ALLOWED = 1
"""Only "not closed properly" (bit 0). Bit 2 says that the data lie in another file, which a program that opens this one
would open too, whatever that is."""
CLUSTER_BYTES = 64 * 1024
"""What ``qemu-img`` makes qcow2 files with."""


def is_qcow2(path: Path) -> bool:
    """Whether the file begins as a qcow2 file does."""
    with path.open("rb") as file:
        return file.read(len(_QCOW2_MAGIC)) == _QCOW2_MAGIC


def virtual_size_bytes(disk: DiskFile) -> int:
    """Size of the disk that the file holds.

    Raises HostError (``disk_file_missing``, ``disk_file_damaged``).
    """
    if disk.format == "raw":
        try:
            with disk.path.open("rb") as file:
                # A block device has a size of 0 for stat.
                return file.seek(0, os.SEEK_END)
        except FileNotFoundError as error:
            raise missing_disk_file(disk.path) from error
    return int.from_bytes(_read_header(disk.path)[24:32], "big")


def find_backing(disk: DiskFile) -> DiskFile | None:
    """The file that this one says it stands over; None if it stands alone, as each raw one does.

    Raises HostError (``disk_file_missing``, ``disk_file_damaged``), the latter also for a backing file that is not named
    by an absolute path and a format.
    """
    if disk.format == "raw":
        return None
    header = _read_header(disk.path)
    offset, length = int.from_bytes(header[8:16], "big"), int.from_bytes(header[16:20], "big")
    if offset == 0:
        return None
    name = header[offset : offset + length]
    if not 0 < length <= _BACKING_NAME_MAX_BYTES or len(name) != length or not name.startswith(b"/") or b"\0" in name:
        raise _damaged(disk.path, "its backing file has no proper name")
    return DiskFile(Path(name.decode(errors="surrogateescape")), _backing_format(disk.path, header[:offset]))


def is_empty_overlay(path: Path) -> bool:
    """Whether nothing was ever written into a qcow2 overlay: it is as short as it was made.

    Raises HostError (``disk_file_missing``, ``disk_file_damaged``).
    """
    # A table of the second level describes 8192 clusters. The first data lie behind the tables and one such.
    disk_bytes = virtual_size_bytes(DiskFile(path, "qcow2"))
    table_bytes = -(-disk_bytes // (8192 * CLUSTER_BYTES)) * 8
    return path.stat().st_size <= (3 + -(-table_bytes // CLUSTER_BYTES)) * CLUSTER_BYTES


def set_backing_file(overlay: Path, backing_file: Path) -> None:
    """Let a qcow2 file, which must not be in use, stand over the same content under another name.

    Only the name in the header changes, as by ``qemu-img rebase -u``, which would follow all that the header names.
    Raises HostError (``path_too_long``, ``disk_file_damaged``).
    """
    present = find_backing(DiskFile(overlay, "qcow2"))
    header = _read_header(overlay)
    name, offset = os.fsencode(backing_file), int.from_bytes(header[8:16], "big")
    # The name is the last thing in the header, which is the first cluster, and ours begin in what is read of that.
    room = len(header) - offset
    if present is None or len(name) > min(room, _BACKING_NAME_MAX_BYTES):
        raise HostError(
            f"the header of {overlay} has no room for the name {backing_file}",
            code="path_too_long",
            hint="choose a data folder with a shorter path",
        )
    with overlay.open("r+b") as file:
        file.seek(offset)
        file.write(name.ljust(min(max(len(os.fsencode(present.path)), len(name)), room), b"\0"))
        file.seek(16)
        file.write(len(name).to_bytes(4, "big"))
        file.flush()
        os.fsync(file.fileno())


def _backing_format(path: Path, header: bytes) -> Literal["raw", "qcow2"]:
    # Version 2 has no field for the header's length.
    version = int.from_bytes(header[4:8], "big")
    position = int.from_bytes(header[100:104], "big") if version >= 3 else _SHORTEST_HEADER_BYTES
    while position + 8 <= len(header):
        kind, length = (int.from_bytes(header[start : start + 4], "big") for start in (position, position + 4))
        if kind == _BACKING_FORMAT_EXTENSION:
            match header[position + 8 : position + 8 + length]:
                case b"raw":
                    return "raw"
                case b"qcow2":
                    return "qcow2"
                case _:
                    break
        if kind == 0:
            break
        position += 8 + (length + 7) // 8 * 8
    raise _damaged(path, "the format of its backing file is not stated")


def _read_header(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError as error:
        raise missing_disk_file(path) from error
    if len(header) < _SHORTEST_HEADER_BYTES or header[:4] != _QCOW2_MAGIC:
        raise _damaged(path, "it is not a qcow2 file")
    version, encryption = (int.from_bytes(header[start : start + 4], "big") for start in (4, 32))
    features = int.from_bytes(header[72:80], "big") if version >= 3 else 0
    if version not in (2, 3) or encryption or features & ~_INCOMPATIBLE_FEATURES_ALLOWED:
        raise _damaged(path, "it is of another kind than the ones that are made here")
    return header


def missing_disk_file(path: Path) -> HostError:
    return HostError(
        f"the disk file {path} is missing", code="disk_file_missing", hint="if it is an image, build it again"
    )


def _damaged(path: Path, reason: str) -> HostError:
    return HostError(f"{path} cannot be used as a disk: {reason}", code="disk_file_damaged")
