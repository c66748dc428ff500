"""The agent's file services, driven by E2B's own client."""

from __future__ import annotations

import gzip
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from agent_fixture import RunningAgent, running_agent
from e2b import FileNotFoundException, FilesystemEventType, FileType, InvalidArgumentException, SandboxException
from e2b.sandbox.signature import get_signature
from e2b.sandbox_sync.filesystem.filesystem import Filesystem
from e2b.sandbox_sync.filesystem.watch_handle import WatchHandle

CREATE_CHMOD_WRITE = [FilesystemEventType.CREATE, FilesystemEventType.CHMOD, FilesystemEventType.WRITE]


@pytest.fixture
def files(agent: RunningAgent) -> Filesystem:
    return agent.files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("content", ["", "text\n", "ünïcödé ☃\n" * 10_000])
def test_write_and_read_text(files: Filesystem, folder: Path, content: str) -> None:
    info = files.write(f"{folder}/a/b/f.txt", content)
    assert (info.name, info.path, info.type) == ("f.txt", f"{folder}/a/b/f.txt", FileType.FILE)
    assert files.read(f"{folder}/a/b/f.txt") == content


def test_write_and_read_bytes_in_every_way(files: Filesystem, folder: Path) -> None:
    content = os.urandom(2_000_000)
    files.write(f"{folder}/bytes", content)
    files.write(f"{folder}/octets", content, use_octet_stream=True)
    files.write(f"{folder}/gzip", content, gzip=True)
    files.write(f"{folder}/file", io.BytesIO(content))
    files.write(f"{folder}/chunks", (content[start : start + 70_000] for start in range(0, len(content), 70_000)))
    for name in ("bytes", "octets", "gzip", "file", "chunks"):
        assert bytes(files.read(f"{folder}/{name}", format="bytes")) == content, name
        assert b"".join(files.read(f"{folder}/{name}", format="stream")) == content, name
        assert bytes(files.read(f"{folder}/{name}", format="bytes", gzip=True)) == content, name


def test_write_files(files: Filesystem, folder: Path) -> None:
    written = files.write_files([{"path": f"{folder}/{number}", "data": str(number)} for number in range(10)])
    assert [info.path for info in written] == [f"{folder}/{number}" for number in range(10)]
    assert all(files.read(f"{folder}/{number}") == str(number) for number in range(10))
    assert files.write_files([]) == []


def test_overwriting(files: Filesystem, folder: Path) -> None:
    files.write(f"{folder}/f", "a long first content")
    files.write(f"{folder}/f", "short")
    assert files.read(f"{folder}/f") == "short"


def test_reading_what_is_not_there(files: Filesystem, folder: Path) -> None:
    with pytest.raises(FileNotFoundException):
        files.read(f"{folder}/absent")
    with pytest.raises(InvalidArgumentException):
        files.read(str(folder))
    with pytest.raises(FileNotFoundException):
        files.get_info(f"{folder}/absent")
    with pytest.raises(FileNotFoundException):
        files.list(f"{folder}/absent")
    with pytest.raises(FileNotFoundException):
        files.rename(f"{folder}/absent", f"{folder}/there")


def test_list(files: Filesystem, folder: Path) -> None:
    files.make_dir(f"{folder}/one/two/three")
    files.write(f"{folder}/one/file", "content")
    (folder / "one/link").symlink_to(folder / "one/file")
    entries = files.list(str(folder))
    assert [(entry.name, entry.type, entry.path) for entry in entries] == [("one", FileType.DIR, f"{folder}/one")]
    entries = files.list(str(folder), depth=3)
    assert [entry.path.removeprefix(f"{folder}/") for entry in entries] == [
        "one", "one/file", "one/link", "one/two", "one/two/three",
    ]  # fmt: skip
    by_name = {entry.name: entry for entry in entries}
    assert (by_name["file"].size, by_name["file"].permissions, by_name["file"].mode) == (7, "-rw-r--r--", 0o644)
    assert by_name["link"].type is FileType.SYMLINK
    assert by_name["link"].symlink_target == f"{folder}/one/file"
    assert by_name["file"].symlink_target is None
    assert abs(by_name["file"].modified_time.timestamp() - time.time()) < 600


def test_info_exists_make_rename_remove(files: Filesystem, folder: Path) -> None:
    path = f"{folder}/dir"
    assert not files.exists(path)
    assert files.make_dir(path) is True
    assert files.make_dir(path) is False
    assert files.exists(path)
    info = files.get_info(path)
    assert (info.name, info.type, info.owner) == ("dir", FileType.DIR, "root" if os.getuid() == 0 else info.owner)
    moved = files.rename(path, f"{folder}/other")
    assert (moved.name, moved.path) == ("other", f"{folder}/other")
    assert not files.exists(path)
    files.write(f"{folder}/other/f", "x")
    files.remove(f"{folder}/other")
    assert not files.exists(f"{folder}/other")
    files.remove(f"{folder}/other")


def test_metadata(files: Filesystem, folder: Path) -> None:
    try:
        os.setxattr(folder, "user.probe", b"1")
    except OSError:
        pytest.skip("this file system keeps no user attributes")
    written = files.write(f"{folder}/f", "x", metadata={"purpose": "a test"})
    assert written.metadata == {"purpose": "a test"}
    assert files.get_info(f"{folder}/f").metadata == {"purpose": "a test"}


def until(
    handle: WatchHandle, wanted: Callable[[list[tuple[str, FilesystemEventType]]], bool]
) -> list[tuple[str, FilesystemEventType]]:
    seen: list[tuple[str, FilesystemEventType]] = []
    for _ in range(200):
        seen += [(event.name, event.type) for event in handle.get_new_events()]
        if wanted(seen):
            break
        time.sleep(0.05)
    return seen


def test_a_watched_write_is_create_chmod_write(files: Filesystem, folder: Path) -> None:
    handle = files.watch_dir(str(folder))
    files.write(f"{folder}/f", "content")
    # No waiting: what has happened before the call is in its answer.
    assert [(event.name, event.type) for event in handle.get_new_events()] == [
        ("f", kind) for kind in CREATE_CHMOD_WRITE
    ]
    files.rename(f"{folder}/f", f"{folder}/g")
    assert [(event.name, event.type) for event in handle.get_new_events()] == [
        ("f", FilesystemEventType.RENAME), ("g", FilesystemEventType.CREATE),
    ]  # fmt: skip
    files.remove(f"{folder}/g")
    assert [(event.name, event.type) for event in handle.get_new_events()] == [("g", FilesystemEventType.REMOVE)]
    handle.stop()
    with pytest.raises(SandboxException):
        handle.get_new_events()


def test_a_recursive_watch_with_entries(files: Filesystem, folder: Path) -> None:
    files.make_dir(f"{folder}/one")
    handle = files.watch_dir(str(folder), recursive=True, include_entry=True)
    files.write(f"{folder}/one/f", "content")
    events = handle.get_new_events()
    assert [(event.name, event.type) for event in events] == [("one/f", kind) for kind in CREATE_CHMOD_WRITE]
    assert all(event.entry is not None and event.entry.size == 7 for event in events)
    files.write(f"{folder}/two/three/g", "content")
    seen = until(handle, lambda seen: ("two/three/g", FilesystemEventType.CREATE) in seen)
    assert {"two", "two/three", "two/three/g"} <= {name for name, _ in seen}
    handle.stop()


def test_watching_what_is_not_there(files: Filesystem, folder: Path) -> None:
    with pytest.raises(FileNotFoundException):
        files.watch_dir(f"{folder}/absent")


async def test_a_streamed_watch(agent: RunningAgent, folder: Path) -> None:
    import asyncio

    from agent_fixture import ENVD_VERSION
    from e2b.api.client_async import get_envd_api
    from e2b.sandbox_async.filesystem.filesystem import Filesystem as AsyncFilesystem

    files = AsyncFilesystem(agent.url, ENVD_VERSION, agent.config, get_envd_api(agent.config, agent.url))
    seen: list[tuple[str, FilesystemEventType]] = []
    three = asyncio.Event()

    def note(event: object) -> None:
        seen.append((event.name, event.type))  # type: ignore[attr-defined]
        if len(seen) == 3:
            three.set()

    handle = await files.watch_dir(str(folder), on_event=note, timeout=0)
    await files.write(f"{folder}/f", "content")
    async with asyncio.timeout(30):
        await three.wait()
    assert seen == [("f", kind) for kind in CREATE_CHMOD_WRITE]
    await handle.stop()


@pytest.fixture(scope="module")
def closed_agent() -> Iterator[RunningAgent]:
    with running_agent("--token", "sesame") as started:
        yield started


def test_signed_urls(closed_agent: RunningAgent, folder: Path) -> None:
    (folder / "f").write_text("content")

    def url(operation: str, path: str, **options: int) -> httpx.URL:
        signature = get_signature(path, operation, "root", "sesame", options.get("expiration_in_seconds"))  # type: ignore[arg-type]
        parameters = {"path": path, "username": "root", "signature": signature["signature"]}
        if signature["expiration"] is not None:
            parameters["signature_expiration"] = str(signature["expiration"])
        return httpx.URL(f"{closed_agent.url}/files", params=parameters)

    assert httpx.get(f"{closed_agent.url}/files", params={"path": f"{folder}/f"}).status_code == 401
    assert httpx.get(url("read", f"{folder}/f")).text == "content"
    assert httpx.get(url("read", f"{folder}/f", expiration_in_seconds=60)).text == "content"
    assert httpx.get(url("write", f"{folder}/f")).status_code == 401
    assert httpx.get(url("read", f"{folder}/f", expiration_in_seconds=-60)).status_code == 401
    sent = httpx.post(url("write", f"{folder}/g"), files={"file": gzip.compress(b"x")})
    assert sent.status_code == 200
    assert gzip.decompress((folder / "g").read_bytes()) == b"x"
