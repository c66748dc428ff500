"""Locks, whole-file writes, private folders and bounded tails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atelier.host import files
from atelier.model.errors import AlreadyRunningError, DiskFullError, HostError


def test_a_second_lock_is_refused_in_words(tmp_path: Path) -> None:
    with files.lock_folder(tmp_path / "lock"):
        with pytest.raises(AlreadyRunningError) as refusal:
            files.lock_folder(tmp_path / "lock")
        assert str(tmp_path) in refusal.value.message
        assert f"process {os.getpid()}" in refusal.value.message
        assert refusal.value.hint
    files.lock_folder(tmp_path / "lock").release()


def test_whether_a_folder_is_locked_can_be_seen_without_a_trace(tmp_path: Path) -> None:
    lock_file = tmp_path / "lock"
    assert not files.is_folder_locked(lock_file)
    assert not lock_file.exists()
    with files.lock_folder(lock_file):
        assert files.is_folder_locked(lock_file)
    assert not files.is_folder_locked(lock_file)


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    holds = "import sys, pathlib; from atelier.host.files import lock_folder; "
    holds += "lock = lock_folder(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(AlreadyRunningError, match=f"process {child.pid}"):
        files.lock_folder(tmp_path / "lock")
    child.kill()
    child.communicate()
    files.lock_folder(tmp_path / "lock").release()


def test_writing_replaces_the_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old and longer")
    files.write_atomically(target, b"new", mode=0o640)
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=str(target)) as refusal:
        files.write_atomically(target, b"new")
    assert refusal.value.hint
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_device_is_a_full_disk() -> None:
    with pytest.raises(DiskFullError), files.disk_full_as_error("writing"), Path("/dev/full").open("wb") as device:
        device.write(b"x")
        device.flush()


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_atomically(tmp_path / "absent" / "file", b"x")


def test_a_private_folder_is_ours_alone(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    files.ensure_private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    files.ensure_private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_private_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError) as refusal:
        files.ensure_private_folder(tmp_path / "link")
    assert refusal.value.code == "folder_not_ours"


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder away needs root")
def test_a_private_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 54321, 54321)
    with pytest.raises(HostError) as refusal:
        files.ensure_private_folder(tmp_path / "theirs")
    assert refusal.value.code == "folder_not_ours"


def test_tails(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert files.read_tail(log, 10) == b""
    log.write_bytes(b"0123456789")
    assert files.read_tail(log, 4) == b"6789"
    assert files.read_tail(log, 100) == b"0123456789"


def test_trimming_a_file_that_is_still_written_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"a" * 1000 + b"tail")
        files.trim_to_tail(log, 2000, keep_bytes=10)
        assert log.stat().st_size == 1004
        files.trim_to_tail(log, 500, keep_bytes=10)
        writer.write(b", more")
    assert log.read_bytes() == b"aaaaaatail, more"


def test_what_is_no_regular_file_reads_as_empty(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        assert files.read_tail(tmp_path / name, 10) == b""
        files.trim_to_tail(tmp_path / name, 1, keep_bytes=0)
    assert (tmp_path / "secret").stat().st_size == 100


def test_free_bytes_are_those_of_the_file_system(tmp_path: Path) -> None:
    assert 0 < files.free_bytes(tmp_path) <= 2**60
