"""Block devices that are disks of sandboxes: written, read and compared as a whole, zeros skipped; and nodes for them.

Called by the LVM storage driver and by the root side that grants it devices. A thin volume costs nothing where nothing was
written, and reading that costs next to nothing: so zeros are neither written nor hashed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from atelier.host.sparse_files import read_sparsely
from atelier.model.errors import HostError

_PIECE_BYTES = 1024 * 1024
_BLOCK_BYTES = 64 * 1024
_ZEROS = bytes(_PIECE_BYTES)
_BLKDISCARD = 0x1277
"""Source: linux/fs.h: takes an offset and a length, in bytes."""


def write_device(source: Path, device: Path, *, given_up: threading.Event) -> None:
    """Have the bytes of the file ``source`` on ``device``, whatever was there; on the disk when this returns.

    Raises InterruptedError, OSError.
    """
    with source.open("rb", buffering=0) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        target = os.open(device, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_EXCL)
        try:
            capacity = os.lseek(target, 0, os.SEEK_END)
            if capacity < size_bytes:
                raise HostError(f"{device} has {capacity} bytes, {source} {size_bytes}", code="disk_too_small")
            # What is discarded of a thin volume reads as zeros.
            fcntl.ioctl(target, _BLKDISCARD, struct.pack("QQ", 0, capacity))
            position = 0
            for piece in read_sparsely(file.fileno(), size_bytes):
                check_not_given_up(given_up)
                for start in range(0, len(piece), _BLOCK_BYTES):
                    block = piece[start : start + _BLOCK_BYTES]
                    if block != _ZEROS[: len(block)]:
                        os.pwrite(target, block, position + start)
                position += len(piece)
            os.fsync(target)
        finally:
            os.close(target)


def read_device(device: Path, size_bytes: int, *, given_up: threading.Event) -> Iterator[bytes]:
    """Its first ``size_bytes``, in pieces. Raises InterruptedError, OSError."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        position = 0
        while position < size_bytes:
            check_not_given_up(given_up)
            piece = os.pread(descriptor, min(_PIECE_BYTES, size_bytes - position), position)
            if not piece:
                raise HostError(f"{device} ends after {position} of {size_bytes} bytes", code="disk_file_damaged")
            position += len(piece)
            yield piece
    finally:
        os.close(descriptor)


def checksum_of_disk(path: Path, size_bytes: int, *, given_up: threading.Event) -> str:
    """SHA-256, in hexadecimal, of the size and of each MiB that is not all zeros, with its number before it: the same for
    a device and for a file with the same content."""
    digest = hashlib.sha256(size_bytes.to_bytes(8, "big"))
    for number, piece in enumerate(read_device(path, size_bytes, given_up=given_up)):
        if piece != _ZEROS[: len(piece)]:
            digest.update(number.to_bytes(8, "big"))
            digest.update(piece)
    return digest.hexdigest()


def make_device_node(node: Path, device: Path, *, owner: tuple[int, int], mode: int) -> None:
    """Have ``node``, which is ``owner``'s, lead to the block device behind ``device``. Needs root; ``node`` must lie where
    devices are allowed, as below /dev. What was there by that name goes: numbers of devices are given out anew.

    Raises HostError (``no_device_node``) where ``device`` is none.
    """
    try:
        found = device.stat()
    except FileNotFoundError:
        found = None
    if found is None or not stat.S_ISBLK(found.st_mode):
        raise HostError(
            f"{device} is no block device",
            code="no_device_node",
            hint=f"the logical volume is not active: lvchange -ay -K {device}",
        )
    node.parent.mkdir(parents=True, exist_ok=True)
    fresh = node.with_name(f".{node.name}.new")
    fresh.unlink(missing_ok=True)
    # Nobody else's from its first instant.
    os.mknod(fresh, stat.S_IFBLK, found.st_rdev)
    os.chown(fresh, *owner)
    fresh.chmod(mode)
    fresh.rename(node)


def leads_to(node: Path, device: Path, *, owner: tuple[int, int], mode: int) -> bool:
    """Whether ``make_device_node`` would change nothing."""
    with suppress(FileNotFoundError):
        here, there = node.lstat(), device.stat()
        return (
            stat.S_ISBLK(here.st_mode)
            and here.st_rdev == there.st_rdev
            and (here.st_uid, here.st_gid) == owner
            and stat.S_IMODE(here.st_mode) == mode
        )
    return False


def check_not_given_up(given_up: threading.Event) -> None:
    if given_up.is_set():
        raise InterruptedError
