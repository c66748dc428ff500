"""How files of the image cache get their names, and what their keys depend on."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from atelier.drivers.images.cache import (
    as_build_error,
    check_room,
    hash_tree,
    key_of,
    publish,
    read_manifest,
    remove_left_over_work,
    work_folder,
    write_manifest,
)
from atelier.drivers.images.cpio import CpioArchive
from atelier.model.errors import CommandError, DiskFullError, ImageBuildError


def test_a_key_depends_on_every_part_and_nothing_else() -> None:
    assert key_of("a", ["b", 1]) == key_of("a", ("b", 1))
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("a", "b", "c"), key_of(["a", "b"], "c")}) == 4


def _tree(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "tool").write_text("one")
    (folder / "bin" / "link").symlink_to("tool")
    return folder


def test_a_trees_hash_is_of_names_modes_links_and_contents_but_not_of_times(tmp_path: Path) -> None:
    tree, same = _tree(tmp_path / "a"), _tree(tmp_path / "b")
    os.utime(same / "bin" / "tool", (1, 1))
    before = hash_tree(tree)
    assert before == hash_tree(same)
    (same / "bin" / "tool").chmod(0o755)
    assert hash_tree(same) != before
    (same / "bin" / "tool").chmod(stat.S_IMODE((tree / "bin" / "tool").stat().st_mode))
    (same / "bin" / "link").unlink()
    (same / "bin" / "link").symlink_to("other")
    assert hash_tree(same) != before


def test_a_published_file_is_read_only_and_never_replaced(tmp_path: Path) -> None:
    first, second, final = tmp_path / "first", tmp_path / "second", tmp_path / "image"
    first.write_text("first")
    second.write_text("second")
    publish(first, final)
    publish(second, final)
    assert final.read_text() == "first"
    assert stat.S_IMODE(final.stat().st_mode) == 0o444
    assert not first.exists()


def test_a_work_folder_goes_with_its_block_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), work_folder(tmp_path / "cache", "testing") as work:
        (work / "half").write_text("half")
        raise RuntimeError
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_build_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with work_folder(tmp_path, "testing") as work:
        left = work.with_name(work.name + "x")
        left.mkdir()
        (left / "half").write_text("half")
    (tmp_path / "image.ext4").write_text("image")
    remove_left_over_work(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["image.ext4"]


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="building it"), work_folder(tmp_path, "building it"):
        raise OSError(errno.ENOSPC, "No space left on device")
    full = as_build_error("building it", CommandError("tar: write error: No space left on device"))
    assert isinstance(full, DiskFullError)
    with pytest.raises(DiskFullError, match="MiB are free"):
        check_room(tmp_path, 1 << 40, "building it")


def test_another_failure_shows_the_end_of_what_was_said() -> None:
    failed = as_build_error("building it", CommandError("x" * 10_000 + "E: no such package"))
    assert isinstance(failed, ImageBuildError)
    assert failed.message.endswith("E: no such package")
    assert len(failed.message) < 3000


def test_a_spoilt_manifest_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_manifest(path) is None
    path.write_text("{half")
    assert read_manifest(path) is None
    path.write_text("[]")
    assert read_manifest(path) is None
    write_manifest(path, {"id": "x"})
    assert read_manifest(path) == {"id": "x"}


def _entries(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """name -> (mode, content, device), read by the format's own description."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        name_end = at + 110 + fields[11]
        name = archive[at + 110 : name_end - 1].decode()
        content_at = (name_end + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], archive[content_at : content_at + fields[6]], (fields[9], fields[10]))
        at = (content_at + fields[6] + 3) // 4 * 4


def test_an_initramfs_archive_reads_back(tmp_path: Path) -> None:
    archive = CpioArchive()
    archive.add_directory("dev")
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("init", b"#!/bin/sh\n", executable=True)
    archive.add_file("odd", b"12345")
    archive.add_symlink("sh", "busybox")
    entries = _entries(archive.finish())
    assert entries == {
        "dev": (stat.S_IFDIR | 0o755, b"", (0, 0)),
        "dev/console": (stat.S_IFCHR | 0o600, b"", (5, 1)),
        "init": (stat.S_IFREG | 0o755, b"#!/bin/sh\n", (0, 0)),
        "odd": (stat.S_IFREG | 0o644, b"12345", (0, 0)),
        "sh": (stat.S_IFLNK | 0o777, b"busybox", (0, 0)),
    }
