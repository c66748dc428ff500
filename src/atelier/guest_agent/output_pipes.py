"""Pipes through which parts of files reach the guest channel without passing through this process.

Owned by ``channel``; filled by ``local_stream``. In a guest under software emulation copying a file's bytes in and out of
this process costs as much as all else of a download. The kernel moves pages instead: from its page cache into a pipe,
and from there to the port.

The price is the host's: QEMU writes each place of a port's table to its socket by itself, a page at a time, in its main
loop: 0.18 s of a processor for 100 MB, against 0.02 s for writes of 32 KiB. Where two processors carry emulator,
gateway, manager and client together, that is what a download waits for.

Each frame has a pipe to itself. Linux's virtio port hands the host a table with a place for every page that is in the
pipe, also for those that it was not asked to move, and those places lead nowhere. Source: splice(2), pipe(7); Linux
drivers/char/virtio_console.c, port_fops_splice_write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import deque
from typing import Final

_CAPACITY_BYTES: Final = 256 * 1024
"""More than a frame, with a page each for header and trailer, also where its bytes begin in the middle of a page; a
power of two."""


class OutputPipes:
    """The frames in them are in the order of the channel's output."""

    def __init__(self) -> None:
        self._filled: deque[tuple[int, int]] = deque()
        """(read end, bytes in it)"""
        self._ends: dict[int, int] = {}
        """Write end, by read end."""
        self._free: list[int] = []

    def take_frame(self, descriptor: int, position: int, wanted: int, edges: tuple[bytes, bytes]) -> int:
        """Take a frame: header, ``wanted`` bytes of a file from ``position`` on, trailer. Returns how many bytes the
        file gave; where they are fewer, nothing was taken. Raises OSError: EINVAL where the file's system moves no
        pages, EAGAIN where the pipe is too small, EMFILE, ENFILE."""
        header, trailer = edges
        read_end = self._free.pop() if self._free else self._open()
        write_end = self._ends[read_end]
        is_whole = False
        try:
            os.write(write_end, header)
            count = os.splice(descriptor, write_end, wanted, offset_src=position)
            if count == wanted:
                os.write(write_end, trailer)
                is_whole = True
        finally:
            if is_whole:
                self._filled.append((read_end, len(header) + wanted + len(trailer)))
            else:
                self._close(read_end)
        return count

    def give_to(self, descriptor: int, length: int) -> int:
        """Move up to ``length`` bytes of the first frame on; returns how many. Raises OSError: of the descriptor."""
        read_end, present = self._filled[0]
        count = os.splice(read_end, descriptor, min(length, present))
        if count < present:
            self._filled[0] = (read_end, present - count)
        else:
            self._filled.popleft()
            self._free.append(read_end)
        return count

    def forget(self) -> None:
        """What lies in them is wanted by nobody any more."""
        for read_end, _ in self._filled:
            self._close(read_end)
        self._filled.clear()

    def _close(self, read_end: int) -> None:
        os.close(read_end)
        os.close(self._ends.pop(read_end))

    def _open(self) -> int:
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # One that stays smaller takes less at a time.
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _CAPACITY_BYTES)
        self._ends[read_end] = write_end
        return read_end
