"""Files with holes, read and written without filling them."""

from __future__ import annotations

import os
from pathlib import Path

from atelier.host.sparse_files import read_sparsely, write_sparsely

MIB = 1024 * 1024


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
