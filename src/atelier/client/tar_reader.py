"""Reads a tar stream that a hostile guest may have written: pushed in, piece by piece, every length bounded.

Called by ``folder_writer``, which decides what may touch the disk; nothing here does. The standard library's tarfile
is not used for it: it takes extension headers of any size into memory and has followed lengths into endless loops.
Forms read: ustar, pax and GNU long names. Source: pax(1), POSIX.1-2017; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from atelier.model.errors import GuestProtocolError

BLOCK_BYTES = 512
_EXTENSION_MAX_BYTES = 1024 * 1024
_LARGEST_SIZE = 1 << 62


class MemberKind(Enum):
    FILE = "file"
    DIRECTORY = "folder"
    SYMLINK = "symbolic link"
    HARD_LINK = "hard link"
    DEVICE = "device"
    FIFO = "fifo"
    OTHER = "entry of an unknown kind"


@dataclass(frozen=True, slots=True)
class TarMember:
    """One entry as the archive states it, nothing of it believed yet. ``mode`` holds all twelve permission bits."""

    name: bytes
    kind: MemberKind
    mode: int
    size_bytes: int
    modified_at_seconds: float
    link_target: bytes


class TarSink(Protocol):
    """What is told of the archive's content. ``write`` comes between ``begin`` and ``end`` of a member."""

    def begin(self, member: TarMember) -> None: ...

    def write(self, data: memoryview) -> None: ...

    def end(self) -> None: ...


class _State(Enum):
    HEADER = 1
    EXTENSION = 2
    CONTENT = 3
    PADDING = 4
    FINISHED = 5


_KINDS = {
    b"0": MemberKind.FILE,
    b"\0": MemberKind.FILE,
    b"7": MemberKind.FILE,
    b"1": MemberKind.HARD_LINK,
    b"2": MemberKind.SYMLINK,
    b"3": MemberKind.DEVICE,
    b"4": MemberKind.DEVICE,
    b"5": MemberKind.DIRECTORY,
    b"6": MemberKind.FIFO,
}
_EXTENSIONS = (b"x", b"g", b"L", b"K")


def broken_archive(reason: str) -> GuestProtocolError:
    return GuestProtocolError(
        f"the archive that the sandbox sent is broken: {reason}",
        code="broken_archive",
        hint="nothing after this point was unpacked; copy again, or copy single files",
    )


class TarReader:
    """``feed`` it the stream, then call ``finish``; it tells ``sink``. Raises GuestProtocolError on the first
    thing that is no tar. Holds at most one extension header (1 MiB) and one block."""

    def __init__(self, sink: TarSink) -> None:
        self._sink = sink
        self._state = _State.HEADER
        self._buffer = bytearray()
        self._remaining_bytes = 0
        self._padding_bytes = 0
        self._extension_type = b""
        self._overrides: dict[bytes, bytes] = {}
        self._seen_end = False

    def feed(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        while len(view) > 0 and self._state is not _State.FINISHED:
            if self._state is _State.CONTENT:
                view = self._take_content(view)
            elif self._state is _State.PADDING:
                taken = min(self._padding_bytes, len(view))
                self._padding_bytes -= taken
                view = view[taken:]
                if self._padding_bytes == 0:
                    self._state = _State.HEADER
            else:
                view = self._collect(view)

    def finish(self) -> None:
        """Say that the stream has ended; raises if the archive has not."""
        if self._state is not _State.FINISHED and not (self._seen_end and not self._buffer):
            raise broken_archive("it ends too early")

    def _take_content(self, view: memoryview) -> memoryview:
        taken = min(self._remaining_bytes, len(view))
        self._sink.write(view[:taken])
        self._remaining_bytes -= taken
        if self._remaining_bytes == 0:
            self._end_content()
        return view[taken:]

    def _end_content(self) -> None:
        self._sink.end()
        self._state = _State.PADDING if self._padding_bytes else _State.HEADER

    def _collect(self, view: memoryview) -> memoryview:
        wanted = BLOCK_BYTES if self._state is _State.HEADER else self._remaining_bytes
        taken = min(wanted - len(self._buffer), len(view))
        self._buffer += view[:taken]
        if len(self._buffer) == wanted:
            block = bytes(self._buffer)
            self._buffer.clear()
            if self._state is _State.HEADER:
                self._read_header(block)
            else:
                self._read_extension(block)
        return view[taken:]

    def _read_header(self, block: bytes) -> None:
        if not any(block):
            # Two blocks of zeros end an archive; one, at the end of the stream, is accepted too.
            self._state = _State.FINISHED if self._seen_end else _State.HEADER
            self._seen_end = True
            return
        if self._seen_end:
            raise broken_archive("something follows its end mark")
        _check_sum(block)
        size = _number(block[124:136], "size")
        kind_byte = block[156:157]
        if kind_byte in _EXTENSIONS:
            if size > _EXTENSION_MAX_BYTES:
                raise broken_archive(f"a header of {size} bytes")
            self._extension_type = kind_byte
            self._padding_bytes = -size % BLOCK_BYTES
            self._remaining_bytes = size
            self._state = _State.EXTENSION
            if size == 0:
                self._read_extension(b"")
            return
        self._begin_member(block, kind_byte, size)

    def _read_extension(self, content: bytes) -> None:
        match self._extension_type:
            case b"L":
                self._overrides[b"path"] = content.rstrip(b"\0")
            case b"K":
                self._overrides[b"linkpath"] = content.rstrip(b"\0")
            case b"x":
                self._overrides.update(_pax_records(content))
            case _:
                pass  # a global header tells nothing that is of use here
        self._state = _State.PADDING if self._padding_bytes else _State.HEADER

    def _begin_member(self, block: bytes, kind_byte: bytes, size: int) -> None:
        overrides, self._overrides = self._overrides, {}
        name = block[0:100].split(b"\0", 1)[0]
        if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
            name = prefix + b"/" + name
        name = overrides.get(b"path", name)
        if b"size" in overrides:
            size = _decimal(overrides[b"size"], "size")
        kind = _KINDS.get(kind_byte, MemberKind.OTHER)
        if any(key.startswith(b"GNU.sparse.") for key in overrides):
            kind = MemberKind.OTHER  # its content is no plain content
        if kind is MemberKind.FILE and kind_byte != b"0" and name.endswith(b"/"):
            kind = MemberKind.DIRECTORY  # as the oldest form writes them
        if size and kind not in (MemberKind.FILE, MemberKind.OTHER):
            raise broken_archive(f"a {kind.value} with content")
        member = TarMember(
            name=name,
            kind=kind,
            mode=_number(block[100:108], "mode") & 0o7777,
            size_bytes=size,
            modified_at_seconds=_modified_at(block, overrides),
            link_target=overrides.get(b"linkpath", block[157:257].split(b"\0", 1)[0]),
        )
        self._remaining_bytes = size
        self._padding_bytes = -size % BLOCK_BYTES
        self._sink.begin(member)
        self._state = _State.CONTENT
        if size == 0:
            self._end_content()


def _check_sum(block: bytes) -> None:
    stated = _number(block[148:156], "checksum")
    if sum(block[:148]) + 8 * 0x20 + sum(block[156:]) != stated:
        raise broken_archive("a header's checksum is wrong")


def _number(field: bytes, what: str) -> int:
    if field[0] & 0x80:
        # Base 256, as GNU tar writes what octal digits cannot hold; a set sign bit would mean a negative number.
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40 or value > _LARGEST_SIZE:
            raise broken_archive(f"a {what} beyond all bounds")
        return value
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise broken_archive(f"a {what} that is no number")
    return int(digits, 8) if digits else 0


def _decimal(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 19 or int(text) > _LARGEST_SIZE:
        raise broken_archive(f"a {what} that is no number")
    return int(text)


def _modified_at(block: bytes, overrides: dict[bytes, bytes]) -> float:
    """Seconds since the epoch; what cannot be a date of a file becomes 0."""
    try:
        stated = float(overrides[b"mtime"]) if b"mtime" in overrides else float(_number(block[136:148], "time"))
    except (ValueError, GuestProtocolError):
        return 0.0
    return stated if 0 <= stated < 1 << 40 else 0.0


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """``<length> <key>=<value>\\n`` records; the length counts the whole record."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 9)
        digits = content[position:space] if space > 0 else b""
        if not digits.isdigit():
            raise broken_archive("a pax header without a length")
        end = position + int(digits)
        record = content[space + 1 : end]
        key, separator, value = record[:-1].partition(b"=")
        if end > len(content) or end <= space or not record.endswith(b"\n") or not separator:
            raise broken_archive("a pax header with a false length")
        if key in (b"path", b"linkpath", b"size", b"mtime") or key.startswith(b"GNU.sparse."):
            records[key] = value
        position = end
    return records
