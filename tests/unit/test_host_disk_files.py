"""What is read out of a qcow2 header, as qemu-img writes it and as nobody should."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tests.real_machines import missing_programs

from atelier.host.disk_files import find_backing, is_empty_overlay, set_backing_file, virtual_size_bytes
from atelier.model.errors import HostError
from atelier.model.machine import DiskFile

NO_QEMU_IMG = missing_programs("qemu-img", "qemu-io")
MIB = 1024 * 1024
needs_qemu_img = pytest.mark.skipif(bool(NO_QEMU_IMG), reason=NO_QEMU_IMG)


def overlay(path: Path, *options: str, backing: str = "/base.raw", backing_format: str = "raw") -> DiskFile:
    words = ["qemu-img", "create", "-qu", "-f", "qcow2", *options, "-F", backing_format, "-b", backing, str(path), "5M"]
    subprocess.run(words, check=True)
    return DiskFile(path, "qcow2")


@needs_qemu_img
@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_size_and_backing(tmp_path: Path, version: str) -> None:
    compatible = ("-o", f"compat={version}")
    disk = overlay(tmp_path / "one", *compatible)
    assert virtual_size_bytes(disk) == 5 * 1024 * 1024
    assert find_backing(disk) == DiskFile(Path("/base.raw"), "raw")
    other = overlay(tmp_path / "two", *compatible, backing=f"/{'n' * 900}", backing_format="qcow2")
    assert find_backing(other) == DiskFile(Path(f"/{'n' * 900}"), "qcow2")


@needs_qemu_img
def test_what_stands_alone(tmp_path: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "alone"), "5M"], check=True)
    assert find_backing(DiskFile(tmp_path / "alone", "qcow2")) is None
    assert find_backing(DiskFile(tmp_path / "alone", "raw")) is None


def test_what_is_missing_or_no_qcow2_file(tmp_path: Path) -> None:
    for read in (find_backing, virtual_size_bytes):
        with pytest.raises(HostError) as missing:
            read(DiskFile(tmp_path / "absent", "qcow2"))
        assert missing.value.code == "disk_file_missing"
        for content in (b"", b"QFI\xfb", b"x" * 5000):
            (tmp_path / "other").write_bytes(content)
            with pytest.raises(HostError) as damaged:
                read(DiskFile(tmp_path / "other", "qcow2"))
            assert damaged.value.code == "disk_file_damaged"


@needs_qemu_img
@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (8, bytes(7) + b"\x01"),  # the name lies in the header itself, and is none
        (8, b"\xff" * 8),
        (16, bytes(4)),
        (16, b"\xff" * 4),
        (100, b"\xff" * 4),  # the header's length
        (104, b"\xff" * 8),  # the first extension's kind and length
        (104, bytes(8)),
    ],
)
def test_a_header_that_makes_no_sense(tmp_path: Path, offset: int, value: bytes) -> None:
    disk = overlay(tmp_path / "one")
    with disk.path.open("r+b") as file:
        file.seek(100)
        if offset == 104:
            offset = int.from_bytes(file.read(4), "big")
        file.seek(offset)
        file.write(value)
    with pytest.raises(HostError) as damaged:
        find_backing(disk)
    assert damaged.value.code == "disk_file_damaged"


@needs_qemu_img
def test_the_name_of_the_backing_file_can_be_changed(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(5 * MIB))
    disk = overlay(tmp_path / "one", backing=str(tmp_path / "base"))
    for name in ("b", "a-much-longer-name" * 10, "short"):
        moved = tmp_path / name
        moved.write_bytes(bytes(5 * MIB))
        set_backing_file(disk.path, moved)
        assert find_backing(disk) == DiskFile(moved, "raw")
        told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(disk.path)]))
        assert (told["backing-filename"], told["backing-filename-format"]) == (str(moved), "raw")
        subprocess.run(["qemu-img", "check", "-q", str(disk.path)], check=True)
    before = disk.path.read_bytes()
    with pytest.raises(HostError) as refused:
        set_backing_file(disk.path, tmp_path / ("x" * 1100))
    assert refused.value.code == "path_too_long"
    assert disk.path.read_bytes() == before


@needs_qemu_img
def test_a_relative_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        find_backing(overlay(tmp_path / "one", backing="base.raw"))


@needs_qemu_img
def test_every_header_cut_short_is_refused_or_read(tmp_path: Path) -> None:
    disk = overlay(tmp_path / "one")
    whole = disk.path.read_bytes()[:1024]
    for length in range(0, len(whole), 3):
        disk.path.write_bytes(whole[:length])
        try:
            assert find_backing(disk) == DiskFile(Path("/base.raw"), "raw")
        except HostError as error:
            assert error.code == "disk_file_damaged"


@needs_qemu_img
def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    """Whose data lie in another file, say: a program that opens the one opens the other."""
    plain = overlay(tmp_path / "plain", backing_format="qcow2")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d", tmp_path / "data", "5M"]
    )
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", tmp_path / "extended", "5M"])
    encrypted, newer = tmp_path / "encrypted", tmp_path / "newer"
    for path, position in ((encrypted, 35), (newer, 7)):
        path.write_bytes(plain.path.read_bytes())
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"\4")
    for name in ("data", "extended", "encrypted", "newer"):
        for read in (find_backing, virtual_size_bytes):
            with pytest.raises(HostError) as refused:
                read(DiskFile(tmp_path / name, "qcow2"))
            assert refused.value.code == "disk_file_damaged"


@needs_qemu_img
@pytest.mark.parametrize("size", ["1M", "600M", "16T"])
def test_an_overlay_is_empty_until_something_is_written(tmp_path: Path, size: str) -> None:
    path = tmp_path / "one"
    create = ["qemu-img", "create", "-qu", "-f", "qcow2", "-F", "raw", "-b", "/base.raw", str(path), size]
    subprocess.run(create, check=True)
    assert is_empty_overlay(path)
    file = f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{path}"}},"backing":null}}'
    for written, expected in (("read 0 512", True), ("write -z 0 64k", False), ("write 0 64k", False)):
        subprocess.run(create, check=True)
        subprocess.run(["qemu-io", "-c", written, file], check=True, stdout=subprocess.DEVNULL)
        assert is_empty_overlay(path) is expected, written
