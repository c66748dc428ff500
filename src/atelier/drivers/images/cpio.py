"""Writes a cpio archive in the form that the kernel unpacks as initramfs ("newc"), without a cpio program.

Called by ``kernel``. The same content gives the same bytes: no times, owners or inode numbers of the build machine.
Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

_TRAILER = "TRAILER!!!"


@dataclass
class CpioArchive:
    """Entries in the order added; a folder must be added before what lies in it. Everything belongs to root."""

    _parts: list[bytes] = field(default_factory=list[bytes])
    _count: int = 0

    def add_directory(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755)

    def add_file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def add_symlink(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, name: str, major: int, minor: int) -> None:
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive."""
        self._add(_TRAILER, 0)
        return b"".join(self._parts)

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        # magic, inode, mode, uid, gid, links, mtime, size, device of the file (2), device it is (2), name length, check
        fields = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        self._parts += [_padded(header), _padded(content)]


def _padded(part: bytes) -> bytes:
    return part + b"\0" * (-len(part) % 4)
