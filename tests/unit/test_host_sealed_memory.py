"""A memory file that nobody changes any more."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from atelier.host.sealed_memory import sealed_copy
from atelier.model.errors import HostError

MIB = 1024 * 1024


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    with path.open("wb") as file:
        for position in (0, 3 * MIB + 4096, 40 * MIB - 4096):
            file.seek(position)
            file.write(os.urandom(4096))
        file.truncate(64 * MIB)
    path.chmod(0o400)
    return path


def test_it_holds_the_same_and_its_holes_take_no_memory(source: Path) -> None:
    copy = sealed_copy(source)
    try:
        found = os.fstat(copy)
        assert found.st_size == 64 * MIB
        assert found.st_blocks * 512 < MIB
        assert os.pread(copy, 64 * MIB, 0) == source.read_bytes()
    finally:
        os.close(copy)


def test_nobody_can_write_to_it(source: Path) -> None:
    copy = sealed_copy(source)
    try:
        # As QEMU opens its memory: anew, by name, for writing.
        again = os.open(f"/proc/self/fd/{copy}", os.O_RDWR)
        try:
            for descriptor in (copy, again):
                with pytest.raises(PermissionError):
                    os.pwrite(descriptor, b"x", 0)
                for size in (0, 128 * MIB):
                    with pytest.raises(PermissionError):
                        os.ftruncate(descriptor, size)
                with pytest.raises(PermissionError):
                    mmap.mmap(descriptor, MIB, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with mmap.mmap(again, MIB, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
                private[:4] = b"mine"
            assert os.pread(copy, 4, 0) == source.read_bytes()[:4]
        finally:
            os.close(again)
    finally:
        os.close(copy)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError) as refusal:
        sealed_copy(tmp_path / "absent")
    assert refusal.value.code == "memory_file_unreadable"
