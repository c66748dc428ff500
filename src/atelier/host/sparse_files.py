"""Files with holes: read without reading the holes, written without writing zeros.

Called where disks are copied. A hole reads as zeros everywhere else, so nothing is lost where it is not kept.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import BinaryIO

_PIECE_BYTES = 1024 * 1024
_BLOCK_BYTES = 64 * 1024
_ZEROS = bytes(_PIECE_BYTES)
_ZERO_BLOCK = bytes(_BLOCK_BYTES)


def read_sparsely(descriptor: int, size_bytes: int) -> Iterator[bytes]:
    """Exactly ``size_bytes`` from the beginning, in pieces of at most 1 MiB; holes, and what is missing when the file
    got shorter, are zeros that no disk was asked for."""
    position = 0
    while position < size_bytes:
        data = _next_data(descriptor, position, size_bytes)
        while position < data:
            piece = _ZEROS[: min(_PIECE_BYTES, data - position)]
            position += len(piece)
            yield piece
        if position < size_bytes:
            piece = os.pread(descriptor, min(_PIECE_BYTES, size_bytes - position), position)
            piece = piece or _ZEROS[: min(_PIECE_BYTES, size_bytes - position)]
            position += len(piece)
            yield piece


def write_sparsely(file: BinaryIO, pieces: Iterator[bytes]) -> None:
    """Write ``pieces`` into a new, empty file, leaving holes for whole blocks of zeros."""
    size = 0
    for piece in pieces:
        for start in range(0, len(piece), _BLOCK_BYTES):
            block = piece[start : start + _BLOCK_BYTES]
            if block != _ZERO_BLOCK[: len(block)]:
                file.seek(size + start)
                file.write(block)
        size += len(piece)
    file.truncate(size)


def _next_data(descriptor: int, position: int, size_bytes: int) -> int:
    """Where the next bytes that are no hole begin, at most ``size_bytes``."""
    try:
        return min(os.lseek(descriptor, position, os.SEEK_DATA), size_bytes)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole is left
            return size_bytes
        if error.errno == errno.EINVAL:  # this file system tells no holes
            return position
        raise
