"""What disk files say of themselves, and files with holes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.real_machines import missing_programs

from atelier.host.disk_files import find_backing_file, set_backing_file
from atelier.host.sparse_files import read_sparsely, write_sparsely
from atelier.model.errors import HostError

NO_QEMU_IMG = missing_programs("qemu-img")
needs_qemu_img = pytest.mark.skipif(bool(NO_QEMU_IMG), reason=NO_QEMU_IMG)
MIB = 1024 * 1024


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    (tmp_path / "base").write_bytes(bytes(MIB))
    path = tmp_path / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(tmp_path / "base"), str(path)], check=True
    )
    return path


@needs_qemu_img
def test_the_backing_file_is_read_and_renamed(overlay: Path, tmp_path: Path) -> None:
    assert find_backing_file(overlay) == tmp_path / "base"
    for name in ("b", "a-much-longer-name" * 10, "short"):
        moved = tmp_path / name
        moved.write_bytes(bytes(MIB))
        set_backing_file(overlay, moved)
        assert find_backing_file(overlay) == moved
        told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(overlay)]))
        assert (told["backing-filename"], told["backing-filename-format"]) == (str(moved), "raw")
        subprocess.run(["qemu-img", "check", "-q", str(overlay)], check=True)
    before = overlay.read_bytes()
    with pytest.raises(HostError) as refused:
        set_backing_file(overlay, tmp_path / ("x" * 1100))
    assert refused.value.code == "path_too_long"
    assert overlay.read_bytes() == before


@needs_qemu_img
def test_a_disk_that_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "alone.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    assert find_backing_file(path) is None


@needs_qemu_img
@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"QFI\0"),
        (8, (2**62).to_bytes(8, "big")),
        (8, (8).to_bytes(8, "big")),
        (16, (2**31).to_bytes(4, "big")),
        (20, (200).to_bytes(4, "big")),
    ],
)
def test_a_header_that_lies_is_refused(overlay: Path, offset: int, value: bytes) -> None:
    with overlay.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    with pytest.raises(HostError) as refused:
        find_backing_file(overlay)
    assert refused.value.code == "disk_file_damaged"


def test_holes_are_kept_and_contents_too(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    with source.open("wb") as file:
        for position in (0, 5 * MIB + 123, 40 * MIB - 1):
            file.seek(position)
            file.write(os.urandom(70_000))
        file.truncate(64 * MIB + 17)
    size = source.stat().st_size
    with source.open("rb") as file, copy.open("wb") as target:
        write_sparsely(target, read_sparsely(file.fileno(), size))
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks * 512 < MIB


def test_a_file_that_gets_shorter_is_read_to_its_promised_length(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * (3 * MIB))
    with source.open("rb") as file:
        pieces = read_sparsely(file.fileno(), 3 * MIB)
        read = next(pieces)
        os.truncate(source, MIB + 5)
        read += b"".join(pieces)
    assert read == b"x" * (MIB + 5) + bytes(2 * MIB - 5)
