"""Takes a kernel and its modules out of the compression they are packed in.

Called by ``kernel``. Unpacking a kernel once, at build time, spares every emulated boot half a second of doing it
again. Standard library only: the compressions it does not know are left to the guest.
"""

from __future__ import annotations

import lzma
import struct
from pathlib import Path

from atelier.model.errors import ImageBuildError

_ELF_MAGIC = b"\x7fELF"
_XZ_MAGIC = b"\xfd7zXZ\0"
_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_TRAILER_BYTES = 12
_ELF_NOTE_SEGMENT = 4
_XEN_NOTE_PHYS32_ENTRY = 18


def extract_kernel(image: bytes) -> bytes:
    """The uncompressed ELF kernel inside a bzImage, or the bzImage itself where that cannot be had.

    The ELF form is only of use if a VMM can enter it (PVH). Source: Linux Documentation/arch/x86/boot.rst,
    payload_offset and payload_length. Raises ImageBuildError if ``image`` is no bzImage.
    """
    if image[0x202:0x206] != b"HdrS":
        raise ImageBuildError("the guest kernel's package holds no bzImage")
    setup_bytes = ((image[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[setup_bytes + offset : setup_bytes + offset + length]
    # The last four bytes are the length unpacked, appended by the kernel's build.
    try:
        if payload.startswith(_LZ4_LEGACY_MAGIC):
            kernel = unpack_lz4_legacy(payload[:-4])
        elif payload.startswith(_XZ_MAGIC):
            kernel = lzma.LZMADecompressor().decompress(payload)
        else:
            return image
    except (lzma.LZMAError, IndexError, struct.error) as error:
        raise ImageBuildError(f"the guest kernel could not be unpacked: {error}") from error
    if not kernel.startswith(_ELF_MAGIC) or len(kernel) != struct.unpack("<I", payload[-4:])[0]:
        raise ImageBuildError("the guest kernel could not be unpacked: its length is not what it says")
    return kernel if _has_pvh_entry(kernel) else image


def read_module(path: Path) -> bytes:
    """A kernel module, uncompressed and without its signature.

    apt has verified the package; the guest's kernel, which asks for no signatures, would spend a tenth of an emulated
    boot on verifying them again. It marks itself as tainted by unsigned modules (E) instead.
    Source: Linux Documentation/admin-guide/module-signing.rst; struct module_signature in include/linux/.
    """
    content = path.read_bytes()
    if content.startswith(_XZ_MAGIC):
        content = lzma.decompress(content)
    if content.endswith(_SIGNATURE_MAGIC):
        end = len(content) - len(_SIGNATURE_MAGIC)
        (signature_bytes,) = struct.unpack_from(">I", content, end - 4)
        content = content[: end - _SIGNATURE_TRAILER_BYTES - signature_bytes]
    if not content.startswith(_ELF_MAGIC):
        raise ImageBuildError(f"the driver {path.name} is packed in a way that is not known here")
    return content


def unpack_lz4_legacy(packed: bytes) -> bytes:
    """Source: LZ4 doc/lz4_Frame_format.md (legacy frame: magic, then blocks that know nothing of each other)."""
    position = len(_LZ4_LEGACY_MAGIC)
    blocks: list[bytes] = []
    while position + 4 <= len(packed):
        (length,) = struct.unpack_from("<I", packed, position)
        position += 4
        blocks.append(_unpack_lz4_block(packed[position : position + length]))
        position += length
    return b"".join(blocks)


def _unpack_lz4_block(packed: bytes) -> bytes:
    """Source: LZ4 doc/lz4_Block_format.md: literals, then a match in what was unpacked before, again and again."""
    unpacked = bytearray()
    position = 0
    while position < len(packed):
        token = packed[position]
        position += 1
        literals = token >> 4
        if literals == 15:
            literals, position = _extend_length(packed, position, literals)
        unpacked += packed[position : position + literals]
        position += literals
        if position >= len(packed):
            break
        distance = packed[position] | packed[position + 1] << 8
        position += 2
        length = token & 15
        if length == 15:
            length, position = _extend_length(packed, position, length)
        length += 4
        start = len(unpacked) - distance
        if distance >= length:
            unpacked += unpacked[start : start + length]
        else:
            # The match overlaps what it produces: its bytes repeat.
            repeated = bytes(unpacked[start:])
            unpacked += (repeated * (length // distance + 1))[:length]
    return bytes(unpacked)


def _extend_length(packed: bytes, position: int, length: int) -> tuple[int, int]:
    while True:
        more = packed[position]
        position += 1
        length += more
        if more != 255:
            return length, position


def _has_pvh_entry(kernel: bytes) -> bool:
    """Whether the note segments hold a PVH entry point. Source: elf(5); xen/include/public/elfnote.h."""
    (program_headers,) = struct.unpack_from("<Q", kernel, 32)
    entry_bytes, count = struct.unpack_from("<HH", kernel, 54)
    for index in range(count):
        at = program_headers + index * entry_bytes
        (kind,) = struct.unpack_from("<I", kernel, at)
        offset, _, _, size = struct.unpack_from("<QQQQ", kernel, at + 8)
        if kind != _ELF_NOTE_SEGMENT:
            continue
        notes = kernel[offset : offset + size]
        position = 0
        while position + 12 <= len(notes):
            name_bytes, value_bytes, note_type = struct.unpack_from("<III", notes, position)
            name = notes[position + 12 : position + 12 + name_bytes]
            if note_type == _XEN_NOTE_PHYS32_ENTRY and name == b"Xen\0":
                return True
            position += 12 + (name_bytes + 3) // 4 * 4 + (value_bytes + 3) // 4 * 4
    return False
