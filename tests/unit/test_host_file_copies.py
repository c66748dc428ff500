"""Copies and checksums of whole files; holes and ``ensure_pinned`` are in ``test_host_file_pins``."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from atelier.host.file_copies import copy_file, sha256_of_file

MIB = 1024 * 1024


def test_a_copy_is_another_file_of_its_own_mode(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * MIB + 17))
    copy_file(source, tmp_path / "copy", mode=0o600)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_ino != source.stat().st_ino
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        copy_file(source, tmp_path / "copy", mode=0o600)


def test_the_checksum_is_of_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"x" * MIB, os.urandom(2 * MIB + 5), bytes(3 * MIB)):
        path.write_bytes(content)
        assert sha256_of_file(path) == hashlib.sha256(content).hexdigest()


def test_given_up_between_two_pieces(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * MIB)
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(InterruptedError):
        sha256_of_file(source, given_up=given_up)
