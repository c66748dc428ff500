"""Kernels and modules are taken out of what they are packed in, and nothing wrong comes out of a broken one."""

from __future__ import annotations

import lzma
import struct
from pathlib import Path

import pytest

from atelier.drivers.images.kernel_payload import extract_kernel, read_module, unpack_lz4_legacy
from atelier.model.errors import ImageBuildError

LZ4_MAGIC = b"\x02\x21\x4c\x18"


def _elf(*, pvh: bool = True, size: int = 4096) -> bytes:
    """As little of an ELF kernel as the note segment takes."""
    other = struct.pack("<III", 4, 1, 6) + b"Xen\0" + b"x" + bytes(3)
    entry = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", 0x1000000)
    notes = other + (entry if pvh else b"")
    header = bytearray(b"\x7fELF" + bytes(60))
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1)
    program = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(notes), len(notes), 4)
    return (bytes(header) + program + notes).ljust(size, b"\x90")


def _bz_image(payload: bytes, *, setup_sectors: int = 3) -> bytes:
    image = bytearray((setup_sectors + 1) * 512)
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + bytes(16) + payload + b"behind the payload"


def _lz4_block(literals: bytes) -> bytes:
    """A block of literals alone."""
    length = len(literals)
    if length < 15:
        return bytes([length << 4]) + literals
    rest = length - 15
    return b"\xf0" + b"\xff" * (rest // 255) + bytes([rest % 255]) + literals


def _lz4(*blocks: bytes) -> bytes:
    return LZ4_MAGIC + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def test_matches_repeat_what_was_unpacked_before_also_overlapping() -> None:
    # "abc", then 9 bytes from 3 back (overlapping), then the literal "!"
    block = bytes([3 << 4 | 5]) + b"abc" + b"\x03\x00" + bytes([1 << 4]) + b"!"
    assert unpack_lz4_legacy(_lz4(block)) == b"abcabcabcabc!"


def test_long_lengths_take_further_bytes_and_blocks_are_independent() -> None:
    text = bytes(range(256)) * 3
    # 15 + 255 + 30 + 4 bytes from 768 back
    match = bytes([0xFF]) + b"\xff\xff\xf3" + text + b"\x00\x03" + b"\xff\x1e" + bytes([0])
    assert unpack_lz4_legacy(_lz4(match, _lz4_block(b"end"))) == text + text[:304] + b"end"


@pytest.mark.parametrize("packing", ["lz4", "xz"])
def test_a_kernel_comes_out_as_it_was(packing: str) -> None:
    kernel = _elf()
    packed = _lz4(_lz4_block(kernel)) if packing == "lz4" else lzma.compress(kernel, check=lzma.CHECK_CRC32)
    assert extract_kernel(_bz_image(packed + struct.pack("<I", len(kernel)))) == kernel


def test_a_kernel_that_a_vmm_cannot_enter_stays_packed() -> None:
    kernel = _elf(pvh=False)
    image = _bz_image(_lz4(_lz4_block(kernel)) + struct.pack("<I", len(kernel)))
    assert extract_kernel(image) == image


def test_an_unknown_packing_is_left_to_the_guest() -> None:
    image = _bz_image(b"\x28\xb5\x2f\xfd zstd")
    assert extract_kernel(image) == image


@pytest.mark.parametrize(
    "image",
    [
        b"no kernel at all",
        _bz_image(_lz4(_lz4_block(_elf())) + struct.pack("<I", 17)),
        _bz_image(_lz4(b"\xf0\xff") + struct.pack("<I", 4096)),
        _bz_image(lzma.compress(_elf())[:40] + b"\0" * 300),
    ],
    ids=["no bzImage", "wrong length", "cut off", "spoilt"],
)
def test_a_broken_kernel_is_refused(image: bytes) -> None:
    with pytest.raises(ImageBuildError):
        extract_kernel(image)


def test_modules_are_read_plain_and_compressed(tmp_path: Path) -> None:
    content = _elf()
    plain, packed, unknown = tmp_path / "a.ko", tmp_path / "a.ko.xz", tmp_path / "a.ko.zst"
    plain.write_bytes(content)
    packed.write_bytes(lzma.compress(content))
    unknown.write_bytes(b"\x28\xb5\x2f\xfd")
    trailer = bytes(8) + struct.pack(">I", 300) + b"~Module signature appended~\n"
    signed = tmp_path / "signed.ko"
    signed.write_bytes(content + b"s" * 300 + trailer)
    assert read_module(plain) == content
    assert read_module(packed) == content
    assert read_module(signed) == content
    with pytest.raises(ImageBuildError, match=r"a\.ko\.zst"):
        read_module(unknown)
