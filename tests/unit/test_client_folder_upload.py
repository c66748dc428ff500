"""A local folder as a tar stream: names byte by byte, links as links, and what is no file left out."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from atelier.client.folder_reader import PackReport, pack_folder
from atelier.client.folder_writer import FolderWriter
from atelier.client.local_files import replace_file
from atelier.model.errors import AtelierError, ConflictError, HostError


def pack(folder: Path) -> tuple[bytes, PackReport]:
    report = PackReport()
    return b"".join(pack_folder(folder, report)), report


def make_tree(root: Path) -> None:
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "file").write_bytes(b"x" * 1_000_001)
    (root / "sub" / "run.sh").write_bytes(b"#!/bin/sh\n")
    (root / "sub" / "run.sh").chmod(0o755)
    (root / "link").symlink_to("sub//./run.sh")
    (root / "dangling").symlink_to("/nowhere")
    deep = root.joinpath(*["d" * 60] * 5)
    deep.mkdir(parents=True)
    (deep / "ä").write_text("deep")
    for name in (b"\xff\xfe", b"new\nline", b"-rf"):
        Path(os.fsdecode(bytes(root) + b"/" + name)).write_bytes(name)


def test_the_standard_library_reads_what_is_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make_tree(root)
    data, report = pack(root)
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape", encoding="utf-8") as archive:
        found = {os.fsencode(member.name): member for member in archive}
        assert archive.extractfile("file").read() == b"x" * 1_000_001
    expected = {os.path.relpath(os.path.join(os.fsencode(folder), name), os.fsencode(root))
                for folder, folders, files in os.walk(os.fsencode(root)) for name in (*folders, *files)}  # fmt: skip
    assert set(found) == expected
    assert found[b"link"].linkname == "sub//./run.sh"
    assert found[b"sub/run.sh"].mode == 0o755
    assert found[b"sub"].isdir()
    assert (report.file_count, report.link_count, report.skipped) == (6, 2, [])
    assert all((member.uid, member.gid, member.uname) == (0, 0, "") for member in found.values())


def test_a_folder_comes_back_as_it_went(tmp_path: Path) -> None:
    root, copy = tmp_path / "root", tmp_path / "copy"
    make_tree(root)
    (root / "dangling").unlink()
    (root / "link").unlink()
    (root / "link").symlink_to("sub/run.sh")
    copy.mkdir()
    with FolderWriter(copy) as writer:
        for piece in pack_folder(root, PackReport()):
            writer.feed(piece)
        report = writer.finish()
    assert report.skipped == []

    def tree(folder: Path) -> dict[bytes, object]:
        found: dict[bytes, object] = {}
        for each, folders, files in os.walk(os.fsencode(folder)):
            for name in (*folders, *files):
                path = os.path.join(each, name)
                relative = os.path.relpath(path, os.fsencode(folder))
                if os.path.islink(path):
                    found[relative] = os.readlink(path)
                elif os.path.isfile(path):
                    found[relative] = (Path(os.fsdecode(path)).read_bytes(), os.stat(path).st_mode)
                else:
                    found[relative] = "folder"
        return found

    assert tree(copy) == tree(root)


def test_links_are_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "l").symlink_to("../secret")
    data, _ = pack(tmp_path / "root")
    assert b"secret" not in data.replace(b"../secret", b"")


def test_sockets_and_fifos_are_left_out_and_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        data, report = pack(tmp_path)
    assert sorted(name for name, _ in report.skipped) == [b"fifo", b"socket"]
    assert data == bytes(1024)


def test_a_file_that_shrinks_meanwhile_is_an_error_and_one_that_grows_is_cut(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 600_000)
    stream = pack_folder(tmp_path, PackReport())
    next(stream)  # the header is out: its size is promised
    os.truncate(tmp_path / "f", 10)
    with pytest.raises(ConflictError) as caught:
        list(stream)
    assert caught.value.code == "file_changed"
    stream = pack_folder(tmp_path, PackReport())
    header = next(stream)
    with (tmp_path / "f").open("ab") as file:
        file.write(b"y" * 100_000)
    assert len(header + b"".join(stream)) == 512 + 512 + 1024


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        pack(tmp_path / "absent")
    assert "absent" in caught.value.message


def test_a_download_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    path.chmod(0o751)
    with pytest.raises(ZeroDivisionError), replace_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with replace_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o751
    assert os.listdir(tmp_path) == ["f"]


def test_a_download_to_a_device_goes_there_and_through_a_link_to_its_end(tmp_path: Path) -> None:
    with replace_file(Path("/dev/null")) as file:
        file.write(b"x")
    assert not Path("/dev/null").is_file()
    (tmp_path / "l").symlink_to("real")
    with replace_file(tmp_path / "l") as file:
        file.write(b"x")
    assert (tmp_path / "l").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"x"


def test_a_download_into_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(AtelierError) as caught, replace_file(tmp_path / "absent" / "f"):
        pass
    assert "absent" in caught.value.message
