"""/files of the guest agent: ranges, whole uploads or none, multipart, signatures."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_files_server import TOKEN, call, file_services

from atelier.guest_agent.multipart import MultipartError, MultipartReader, PartBegins, PartBytes, PartEnds

ME = "me" if os.getuid() else "root"
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture(params=["direct", "ordinary"])
async def client(request: pytest.FixtureRequest, tmp_path: Path, home: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Once as over the guest channel, where bodies are poured out of the reader, once as over a plain socket."""
    async with file_services(tmp_path, home, default_user=ME, direct=request.param == "direct") as client:
        yield client


async def put(client: httpx.AsyncClient, path: str, content: bytes, **headers: str) -> httpx.Response:
    return await client.post("/files", params={"path": path}, content=content, headers={**OCTETS, **headers})


async def test_upload_makes_folders_and_comes_back(client: httpx.AsyncClient, home: Path) -> None:
    content = os.urandom(3_000_001)
    answer = await put(client, "deep/down/here.bin", content)
    assert answer.status_code == 200
    [written] = answer.json()
    assert (written["path"], written["name"], written["type"]) == (str(home / "deep/down/here.bin"), "here.bin", "file")
    assert written["entry"]["size"] == str(len(content))
    assert (home / "deep/down/here.bin").read_bytes() == content
    assert (home / "deep/down/here.bin").stat().st_mode & 0o777 == 0o644
    got = await client.get("/files", params={"path": "deep/down/here.bin"})
    assert got.content == content
    assert got.headers["content-length"] == str(len(content))
    assert sorted(os.listdir(home / "deep/down")) == ["here.bin"]


async def test_empty_file(client: httpx.AsyncClient, home: Path) -> None:
    assert (await put(client, "empty", b"")).status_code == 200
    got = await client.get("/files", params={"path": "empty"})
    assert (got.status_code, got.content) == (200, b"")


async def test_chunked_upload(client: httpx.AsyncClient, home: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for number in range(50):
            yield bytes([number]) * 7919

    answer = await client.post("/files", params={"path": "c"}, content=pieces(), headers=OCTETS)
    assert answer.status_code == 200
    assert (home / "c").read_bytes() == b"".join(bytes([number]) * 7919 for number in range(50))


@pytest.mark.parametrize(
    ("header", "status", "first", "last"),
    [
        ("bytes=0-9", 206, 0, 9),
        ("bytes=990-", 206, 990, 999),
        ("bytes=990-5000", 206, 990, 999),
        ("bytes=-10", 206, 990, 999),
        ("bytes=-5000", 206, 0, 999),
        ("bytes=5-4", 200, 0, 999),
        ("bytes=0-1,4-5", 200, 0, 999),
        ("lines=0-1", 200, 0, 999),
    ],
)
async def test_ranges(client: httpx.AsyncClient, home: Path, header: str, status: int, first: int, last: int) -> None:
    content = os.urandom(1000)
    (home / "f").write_bytes(content)
    for method in ("GET", "HEAD"):
        got = await client.request(method, "/files", params={"path": "f"}, headers={"range": header})
        assert got.status_code == status
        assert got.headers["content-length"] == str(last - first + 1)
        if status == 206:
            assert got.headers["content-range"] == f"bytes {first}-{last}/1000"
        assert got.content == (content[first : last + 1] if method == "GET" else b"")


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=2000-3000", "bytes=-0"])
async def test_a_range_beyond_the_end(client: httpx.AsyncClient, home: Path, header: str) -> None:
    (home / "f").write_bytes(bytes(1000))
    got = await client.get("/files", params={"path": "f"}, headers={"range": header})
    assert (got.status_code, got.headers["content-range"]) == (416, "bytes */1000")


async def test_files_without_a_size_are_read(client: httpx.AsyncClient) -> None:
    got = await client.get("/files", params={"path": "/proc/version"})
    assert got.text == Path("/proc/version").read_text()


@pytest.mark.parametrize(("path", "status"), [("absent", 404), ("f/x", 404), (".", 400), ("pipe", 400), ("a\0b", 400)])
async def test_what_cannot_be_downloaded(client: httpx.AsyncClient, home: Path, path: str, status: int) -> None:
    (home / "f").touch()
    os.mkfifo(home / "pipe")
    got = await client.get("/files", params={"path": path})
    assert got.status_code == status
    assert got.json()["message"]


@pytest.mark.parametrize(("path", "status"), [(".", 400), ("pipe", 400), ("f/x", 404), ("", 400)])
async def test_what_cannot_be_uploaded_to(client: httpx.AsyncClient, home: Path, path: str, status: int) -> None:
    (home / "f").touch()
    os.mkfifo(home / "pipe")
    answer = await put(client, path, b"x")
    assert answer.status_code == status, answer.text
    assert sorted(os.listdir(home)) == ["f", "pipe"]


async def test_replacing_keeps_the_mode_and_writes_through_a_link(client: httpx.AsyncClient, home: Path) -> None:
    (home / "script").write_text("old")
    (home / "script").chmod(0o751)
    (home / "sub").mkdir()
    (home / "sub/link").symlink_to("../script")
    assert (await put(client, "sub/link", b"new")).status_code == 200
    assert (home / "sub/link").is_symlink()
    assert (home / "script").read_text() == "new"
    assert (home / "script").stat().st_mode & 0o777 == 0o751


async def test_a_link_to_nowhere_makes_its_target(client: httpx.AsyncClient, home: Path) -> None:
    (home / "link").symlink_to("elsewhere/target")
    assert (await put(client, "link", b"x")).status_code == 200
    assert (home / "elsewhere/target").read_bytes() == b"x"
    (home / "loop").symlink_to("loop")
    assert (await put(client, "loop", b"x")).status_code == 400


async def test_readers_see_the_old_or_the_new_and_a_broken_upload_leaves_nothing(
    client: httpx.AsyncClient, tmp_path: Path, home: Path
) -> None:
    (home / "f").write_bytes(b"old")
    for framing in (b"content-length: 1000000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\nf4240\r\n"):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "agent.sock"))
        writer.write(b"POST /files?path=f HTTP/1.1\r\ncontent-type: application/octet-stream\r\n" + framing)
        writer.write(bytes(500_000))
        await writer.drain()
        await asyncio.sleep(0.05)
        assert (home / "f").read_bytes() == b"old"
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert os.listdir(home) == ["f"]
        assert (home / "f").read_bytes() == b"old"


async def test_a_file_system_without_nameless_files(
    client: httpx.AsyncClient, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def without_tmpfile(path: bytes, flags: int, mode: int = 0o777, **rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real_open(path, flags, mode, **rest)

    monkeypatch.setattr("atelier.guest_agent.staged_file.os.open", without_tmpfile)
    assert (await put(client, "f", b"one")).status_code == 200
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "agent.sock"))
    writer.write(
        b"POST /files?path=f HTTP/1.1\r\ncontent-type: application/octet-stream\r\ncontent-length: 9\r\n\r\ntwo"
    )
    writer.write_eof()
    await reader.read()
    writer.close()
    assert os.listdir(home) == ["f"]
    assert (home / "f").read_bytes() == b"one"


async def test_multipart_with_one_file_and_many(client: httpx.AsyncClient, home: Path) -> None:
    big = os.urandom(700_000)
    answer = await client.post("/files", params={"path": "named"}, files=[("file", ("ignored", big))])
    assert answer.status_code == 200
    assert (home / "named").read_bytes() == big
    several = [("file", (str(home / f"dir/{number} ü"), bytes([number]) * number * 1000)) for number in range(5)]
    answer = await client.post("/files", files=several)
    assert [entry["name"] for entry in answer.json()] == [f"{number} ü" for number in range(5)]
    for number in range(5):
        assert (home / f"dir/{number} ü").read_bytes() == bytes([number]) * number * 1000


async def test_multipart_nothing_appears_when_one_file_fails(client: httpx.AsyncClient, home: Path) -> None:
    (home / "pipe").mkdir()
    answer = await client.post("/files", files=[("file", ("good", b"1")), ("file", ("pipe", b"2"))])
    assert answer.status_code == 400
    assert os.listdir(home) == ["pipe"]
    broken = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nhalf'
    answer = await client.post("/files", content=broken, headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 400
    assert os.listdir(home) == ["pipe"]
    two = await client.post("/files", params={"path": "p"}, files=[("file", ("a", b"1")), ("file", ("b", b"2"))])
    assert two.status_code == 400
    none = await client.post("/files", files={"other": b"1"})
    assert none.status_code == 400


async def test_gzip_uploads(client: httpx.AsyncClient, home: Path) -> None:
    content = b"abc" * 1_000_000
    packed = gzip.compress(content)
    assert (await put(client, "g", packed, **{"content-encoding": "gzip"})).status_code == 200
    assert (home / "g").read_bytes() == content
    for bad in (packed[:-20], b"no gzip at all"):
        answer = await put(client, "bad", bad, **{"content-encoding": "gzip"})
        assert answer.status_code == 400
    assert (await put(client, "bad", b"x", **{"content-encoding": "br"})).status_code == 415
    assert os.listdir(home) == ["g"]


async def test_other_content_types_are_refused(client: httpx.AsyncClient, home: Path) -> None:
    answer = await client.post("/files", params={"path": "f"}, content=b"x", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    assert os.listdir(home) == []


async def test_what_cannot_fit_is_refused_at_once(client: httpx.AsyncClient, tmp_path: Path, home: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "agent.sock"))
    writer.write(
        b"POST /files?path=f HTTP/1.1\r\ncontent-type: application/octet-stream\r\ncontent-length: 99999999999999\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 507 ")
    writer.close()
    assert os.listdir(home) == []


async def test_binary_names(client: httpx.AsyncClient, home: Path) -> None:
    answer = await client.post("/files?path=%ff%fe.bin", content=b"x", headers=OCTETS)
    [written] = answer.json()
    assert written["name"] == "\ufffd\ufffd.bin"
    assert base64.b64decode(written["entry"]["pathBytes"]) == bytes(home) + b"/\xff\xfe.bin"
    assert os.listdir(bytes(home)) == [b"\xff\xfe.bin"]
    assert (await client.get("/files?path=%ff%fe.bin")).content == b"x"


async def test_metadata_is_kept_as_attributes(client: httpx.AsyncClient, home: Path) -> None:
    try:
        os.setxattr(home, "user.probe", b"1")
    except OSError:
        pytest.skip("this file system keeps no user attributes")
    answer = await put(client, "m", b"x", **{"X-Metadata-Purpose": "test"})
    assert answer.json()[0]["metadata"] == {"purpose": "test"}
    stat = await call(client, "Stat", path="m")
    assert stat.json()["entry"]["metadata"] == {"purpose": "test"}


def signature(path: str, operation: str, user: str, expires: int | None) -> dict[str, str]:
    raw = ":".join([path, operation, user, TOKEN, *([str(expires)] if expires is not None else [])])
    text = "v1_" + base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode().rstrip("=")
    parameters = {"path": path, "signature": text}
    if user:
        parameters["username"] = user
    if expires is not None:
        parameters["signature_expiration"] = str(expires)
    return parameters


async def test_signed_urls(tmp_path: Path, home: Path) -> None:
    async with file_services(tmp_path, home, default_user=ME, token=TOKEN) as client:
        del client.headers["x-access-token"]
        (home / "f").write_bytes(b"content")
        soon = int(time.time()) + 600
        assert (await client.get("/files", params={"path": "f"})).status_code == 401
        for user in ("", ME):
            for expires in (None, soon):
                assert (await client.get("/files", params=signature("f", "read", user, expires))).content == b"content"
        answer = await client.post("/files", params=signature("g", "write", "", soon), content=b"up", headers=OCTETS)
        assert answer.status_code == 200
        refused = [
            signature("f", "write", "", None),
            signature("f", "read", "", int(time.time()) - 5),
            {**signature("f", "read", "", None), "path": "g"},
            {**signature("f", "read", "", soon), "signature_expiration": str(soon + 1)},
            {**signature("f", "read", "", None), "username": "root" if ME != "root" else "user"},
            {**signature("f", "read", "", None), "signature": "v1_ü"},
        ]
        for parameters in refused:
            assert (await client.get("/files", params=parameters)).status_code == 401, parameters
        wrong = await client.get("/files", params=signature("f", "read", "", None), headers={"x-access-token": "no"})
        assert wrong.status_code == 401
        assert (await client.get("/archive", params=signature(".", "read", "", None))).status_code == 401


def parts_of(body: bytes, boundary: bytes, step: int) -> list[tuple[PartBegins, bytes]]:
    reader = MultipartReader(boundary)
    found: list[tuple[PartBegins, bytes]] = []
    current: PartBegins | None = None
    content = b""
    for start in range(0, len(body), step):
        for event in reader.feed(body[start : start + step]):
            if isinstance(event, PartBegins):
                current, content = event, b""
            elif isinstance(event, PartBytes):
                content += event.content
            else:
                assert isinstance(event, PartEnds)
                assert current is not None
                found.append((current, content))
    reader.finish()
    return found


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 100_000])
def test_multipart_in_pieces_of_any_size(step: int) -> None:
    tricky = b"\r\n--bound\r\n-\r\n--boun" * 3 + b"\r\n"
    body = (
        b"preamble\r\n--boundary \r\n"
        b'Content-Disposition: form-data; name="file"; filename="a \\"quoted\\" \\\\ name"\r\nX: y\r\n\r\n'
        + tricky
        + b"\r\n--boundary\r\nContent-Disposition: form-data; name=\"file\"; filename*=UTF-8''%C3%BC\r\n\r\n"
        + b"\r\n--boundary\r\n\r\nno headers\r\n--boundary--\r\nepilogue"
    )
    assert parts_of(body, b"boundary", step) == [
        (PartBegins(b"file", b'a "quoted" \\ name'), tricky),
        (PartBegins(b"file", "ü".encode()), b""),
        (PartBegins(b"", None), b"no headers"),
    ]


@pytest.mark.parametrize(
    "body", [b"", b"--b", b"--b\r\nA: b\r\n\r\nx", b"--b\r\n" + b"A" * 20_000, b"--bogus\r\n", b"--b" + b"\t" * 900]
)
def test_broken_multipart(body: bytes) -> None:
    with pytest.raises(MultipartError):
        parts_of(body, b"b", 1000)
