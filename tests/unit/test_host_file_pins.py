"""Second names for files: linked, or copied whole with their holes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from atelier.host.file_pins import ensure_pinned

MIB = 1024 * 1024


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Data, a hole, data across several pieces, a hole at the end."""
    path = tmp_path / "source"
    with path.open("wb") as file:
        file.write(os.urandom(5000))
        file.seek(20 * MIB)
        file.write(os.urandom(3 * MIB + 17))
        file.truncate(64 * MIB)
    path.chmod(0o444)
    return path


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(Path, "hardlink_to", refuse)


def test_a_link_is_the_same_file(source: Path, tmp_path: Path) -> None:
    pin = tmp_path / "pin"
    ensure_pinned(source, pin)
    ensure_pinned(source, pin)
    assert pin.stat().st_ino == source.stat().st_ino
    source.unlink()
    ensure_pinned(source, pin)
    assert pin.stat().st_size == 64 * MIB


def test_a_link_behind_a_symbolic_link_is_to_the_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "symbolic").symlink_to(source)
    ensure_pinned(tmp_path / "symbolic", tmp_path / "pin")
    assert (tmp_path / "pin").stat(follow_symlinks=False).st_ino == source.stat().st_ino


@pytest.mark.usefixtures("no_links")
def test_a_copy_is_whole_sparse_and_read_only(source: Path, tmp_path: Path) -> None:
    pin = tmp_path / "pin"
    (tmp_path / ".pin.new").write_bytes(b"left by a crash")
    ensure_pinned(source, pin)
    assert pin.stat().st_ino != source.stat().st_ino
    assert pin.read_bytes() == source.read_bytes()
    assert pin.stat().st_blocks * 512 < 5 * MIB
    assert pin.stat().st_mode & 0o777 == 0o400
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pin", "source"]


@pytest.mark.usefixtures("no_links")
def test_an_empty_file_and_one_of_holes_only(tmp_path: Path) -> None:
    for name, size in (("empty", 0), ("holes", 8 * MIB)):
        source = tmp_path / name
        with source.open("wb") as file:
            file.truncate(size)
        ensure_pinned(source, tmp_path / f"{name}.pin")
        assert (tmp_path / f"{name}.pin").read_bytes() == bytes(size)


def test_without_a_source_there_is_no_pin(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ensure_pinned(tmp_path / "absent", tmp_path / "pin")
    assert list(tmp_path.iterdir()) == []
