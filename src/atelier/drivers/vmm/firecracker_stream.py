"""A saved machine as one file: its memory as Firecracker wrote it, then its state, then a trailer that tells which is which.

Called by the Firecracker driver. The memory comes first, so that the very file can be mapped: Firecracker maps as much
of it as the machine has, and looks at nothing behind that.

Trailer: ``ATELFC01``, length of the memory, length of the state, CRC-32 of the state; little-endian.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from atelier.host.files import refusal_as_error

_MAGIC = b"ATELFC01"
_TRAILER = struct.Struct("<8sQQI")
_STATE_MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StreamParts:
    memory_bytes: int
    state: bytes


def append_state(memory: Path, state: bytes) -> int:
    """Make a stream of a memory file; returns its size. On the disk when it returns. Raises DiskFullError."""
    with refusal_as_error(f"writing {memory}"), memory.open("r+b") as file:
        memory_bytes = file.seek(0, os.SEEK_END)
        file.write(state)
        file.write(_TRAILER.pack(_MAGIC, memory_bytes, len(state), zlib.crc32(state)))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def read_parts(stream: Path) -> StreamParts:
    """Raises OSError, ValueError for what ``append_state`` has not made, or was damaged since."""
    with stream.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _TRAILER.size:
            raise ValueError("it is too short")
        file.seek(size - _TRAILER.size)
        magic, memory_bytes, state_bytes, checksum = _TRAILER.unpack(file.read(_TRAILER.size))
        if magic != _MAGIC or memory_bytes + state_bytes + _TRAILER.size != size or state_bytes > _STATE_MAX_BYTES:
            raise ValueError("its end is missing")
        file.seek(memory_bytes)
        state = file.read(state_bytes)
    if zlib.crc32(state) != checksum:
        raise ValueError("its state is damaged")
    return StreamParts(memory_bytes, state)
