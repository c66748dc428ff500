"""The agent's filesystem service and archives: listing in pages, removing, moving, names that are no UTF-8."""

from __future__ import annotations

import base64
import io
import os
import stat
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_files_server import call, file_services

from atelier.guest_agent import directory_tree

ME = "me" if os.getuid() else "root"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
async def client(tmp_path: Path, home: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with file_services(tmp_path, home, default_user=ME) as client:
        yield client


async def paths(client: httpx.AsyncClient, home: Path, **message: object) -> list[str]:
    answer = await call(client, "ListDir", **message)
    assert answer.status_code == 200, answer.text
    return [entry["path"].removeprefix(f"{home}/") for entry in answer.json().get("entries", [])]


async def test_stat(client: httpx.AsyncClient, home: Path) -> None:
    (home / "f").write_bytes(b"12345")
    (home / "f").chmod(0o4755)
    os.utime(home / "f", ns=(0, 1_700_000_000_123_456_789))
    (home / "link").symlink_to("f")
    (home / "broken").symlink_to("nowhere")
    (home / "folder-link").symlink_to(".")
    entry = (await call(client, "Stat", path="f")).json()["entry"]
    assert entry["path"] == str(home / "f")
    assert (entry["name"], entry["type"], entry["size"]) == ("f", "FILE_TYPE_FILE", "5")
    assert (entry["mode"], entry["permissions"]) == (0o4755, "-rwsr-xr-x")
    assert entry["modifiedTime"] == "2023-11-14T22:13:20.123456789Z"
    assert entry["owner"] == ME
    kinds = {}
    for name in ("link", "broken", "folder-link"):
        entry = (await call(client, "Stat", path=name)).json()["entry"]
        assert entry["isSymlink"] is True
        kinds[name] = (entry["type"], entry["symlinkTarget"])
    assert kinds == {
        "link": ("FILE_TYPE_FILE", "f"),
        "broken": ("FILE_TYPE_SYMLINK", "nowhere"),
        "folder-link": ("FILE_TYPE_DIRECTORY", "."),
    }
    assert (await call(client, "Stat", path="/dev/null")).json()["entry"]["type"] == "FILE_TYPE_UNSPECIFIED"
    assert (await call(client, "Stat", path="/")).json()["entry"]["name"] == "/"
    absent = await call(client, "Stat", path="f/../absent")
    assert (absent.status_code, absent.json()["code"]) == (404, "not_found")
    assert str(home / "absent") in absent.json()["message"]


@pytest.mark.parametrize("message", [{"path": 5}, {"path": "a\0b"}, {"pathBytes": "!"}, {"path": "~other/x"}])
async def test_paths_that_are_none(client: httpx.AsyncClient, message: dict[str, object]) -> None:
    for procedure in ("Stat", "ListDir", "MakeDir", "Remove"):
        answer = await call(client, procedure, **message)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


async def test_a_path_with_half_a_character(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    answer = await client.post("/filesystem.Filesystem/Stat", content=b'{"path":"\\ud800"}', headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


async def test_make_dir(client: httpx.AsyncClient, home: Path) -> None:
    made = await call(client, "MakeDir", path="a/b/c")
    assert made.json()["entry"]["type"] == "FILE_TYPE_DIRECTORY"
    assert (home / "a/b/c").is_dir()
    assert (await call(client, "MakeDir", path="a/b")).json()["code"] == "already_exists"
    (home / "f").touch()
    assert (await call(client, "MakeDir", path="f")).json()["code"] == "invalid_argument"
    assert (await call(client, "MakeDir", path="f/x")).status_code == 404
    assert (await call(client, "MakeDir", path="n" * 256)).json()["code"] == "invalid_argument"


async def test_move(client: httpx.AsyncClient, home: Path) -> None:
    (home / "f").write_text("f")
    (home / "g").write_text("g")
    moved = await call(client, "Move", source="f", destination="new/place/f")
    assert moved.json()["entry"]["path"] == str(home / "new/place/f")
    assert (await call(client, "Move", source="new/place/f", destination="g")).status_code == 200
    assert (home / "g").read_text() == "f"
    assert (await call(client, "Move", source="absent", destination="made/x")).json()["code"] == "not_found"
    assert not (home / "made").exists()
    (home / "full").mkdir()
    (home / "full/x").touch()
    assert (await call(client, "Move", source="new", destination="full")).json()["code"] == "failed_precondition"
    assert (await call(client, "Move", source="new", destination="new/inside")).json()["code"] == "invalid_argument"


async def test_list_by_depth(client: httpx.AsyncClient, home: Path) -> None:
    (home / "a/b/c").mkdir(parents=True)
    (home / "a/f").touch()
    (home / "a-").touch()
    (home / "z").symlink_to("a")
    assert await paths(client, home, path="") == ["a", "a-", "z"]
    assert await paths(client, home, path=".", depth=2) == ["a", "a/b", "a/f", "a-", "z"]
    assert await paths(client, home, path="~", depth=9) == ["a", "a/b", "a/b/c", "a/f", "a-", "z"]
    assert await paths(client, home, path="z") == ["z/b", "z/f"]
    assert (await call(client, "ListDir", path="a/f")).json()["code"] == "invalid_argument"
    assert (await call(client, "ListDir", path="absent")).json()["code"] == "not_found"


@pytest.mark.parametrize("page_bytes", [1, 1000, 5000])
async def test_list_in_pages(client: httpx.AsyncClient, home: Path, page_bytes: int) -> None:
    for outer in range(6):
        for inner in range(6):
            (home / f"d{outer}/e{inner}").mkdir(parents=True)
            (home / f"d{outer}/e{inner}/f").touch()
    whole = await paths(client, home, path="", depth=3)
    assert len(whole) == 6 + 36 + 36
    got: list[str] = []
    after, pages = "", 0
    while True:
        answer = (await call(client, "ListDir", path="", depth=3, pageBytes=page_bytes, pageAfter=after)).json()
        got += [entry["path"].removeprefix(f"{home}/") for entry in answer["entries"]]
        pages += 1
        after = answer.get("nextPage", "")
        if not after:
            break
    assert got == whole
    assert pages > 2


async def test_too_many_entries_are_said(
    client: httpx.AsyncClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atelier.guest_agent.filesystem.ENTRIES_MAX", 5)
    for number in range(7):
        (home / str(number)).touch()
    assert (await call(client, "ListDir", path="")).json()["code"] == "resource_exhausted"


async def test_remove(client: httpx.AsyncClient, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_tree, "SLICE_ENTRIES", 7)
    outside = home.parent / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    for outer in range(5):
        for inner in range(40):
            (home / f"tree/{outer}/{inner}").mkdir(parents=True)
            (home / f"tree/{outer}/{inner}/file").touch()
        (home / f"tree/{outer}/out").symlink_to(outside)
    (home / "out").symlink_to(outside)
    for path in ("tree", "out", "absent", "tree/below"):
        assert (await call(client, "Remove", path=path)).status_code == 200
    assert os.listdir(home) == []
    assert os.listdir(outside) == ["kept"]
    assert (await call(client, "Remove", path="/")).json()["code"] == "invalid_argument"
    assert (await call(client, "Remove", path="/../.")).json()["code"] == "invalid_argument"


async def test_remove_a_very_deep_tree(client: httpx.AsyncClient, home: Path) -> None:
    here = os.getcwd()
    os.chdir(home)
    try:
        for _ in range(1500):
            os.mkdir("d" * 10)
            os.chdir("d" * 10)
    finally:
        os.chdir(here)
    before = len(os.listdir("/proc/self/fd"))
    assert (await call(client, "Remove", path="d" * 10)).status_code == 200
    assert os.listdir(home) == []
    # Some others of this process come and go; there were 1,500 folders.
    assert len(os.listdir("/proc/self/fd")) < before + 100


async def test_names_that_are_no_text(client: httpx.AsyncClient, home: Path) -> None:
    raw = bytes(home) + b"/\xff\n"
    encoded = base64.b64encode(raw).decode()
    made = (await call(client, "MakeDir", pathBytes=encoded)).json()["entry"]
    assert (made["name"], made["pathBytes"]) == ("\ufffd\n", encoded)
    [listed] = (await call(client, "ListDir", path="")).json()["entries"]
    assert listed["pathBytes"] == encoded
    assert (await call(client, "Move", sourceBytes=encoded, destination="text")).status_code == 200
    assert os.listdir(bytes(home)) == [b"text"]
    other = base64.b64encode(b"\xfe").decode()
    assert (await call(client, "Move", source="text", destinationBytes=other)).status_code == 200
    assert (await call(client, "Remove", pathBytes=other)).status_code == 200
    assert os.listdir(home) == []


def unpacked(content: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        return {entry.name.removeprefix("./").removeprefix("."): entry for entry in archive}


async def test_archives_there_and_back(client: httpx.AsyncClient, home: Path) -> None:
    (home / "from/sub").mkdir(parents=True)
    (home / "from/sub/run").write_bytes(os.urandom(1_500_000))
    (home / "from/sub/run").chmod(0o755)
    (home / "from/link").symlink_to("sub/run")
    (home / "from/empty").mkdir()
    (home / "from/ü -x").touch()
    os.mkdir(bytes(home) + b"/from/\xff")
    got = await client.get("/archive", params={"path": "from"})
    assert got.status_code == 200
    entries = unpacked(got.content)
    assert {"sub/run", "link", "empty", "ü -x"} <= entries.keys()
    assert entries["sub/run"].mode & 0o777 == 0o755
    answer = await client.post("/archive", params={"path": "to/here"}, content=got.content)
    assert answer.status_code == 200
    assert (home / "to/here/sub/run").read_bytes() == (home / "from/sub/run").read_bytes()
    assert stat.S_IMODE((home / "to/here/sub/run").stat().st_mode) == 0o755
    assert os.readlink(home / "to/here/link") == "sub/run"
    assert sorted(os.listdir(bytes(home) + b"/to/here")) == sorted(os.listdir(bytes(home) + b"/from"))


async def test_archive_errors_are_seen(client: httpx.AsyncClient, home: Path) -> None:
    (home / "f").touch()
    assert (await client.get("/archive", params={"path": "absent"})).status_code == 404
    assert (await client.get("/archive", params={"path": "f"})).status_code == 400
    assert (await client.get("/archive")).status_code == 400
    assert (await client.post("/archive", params={"path": "f"}, content=b"")).status_code == 404
    for bad in (b"no tar at all" * 100, os.urandom(2_000_000)):
        answer = await client.post("/archive", params={"path": "into"}, content=bad)
        assert answer.status_code == 400, answer.text
        assert answer.json()["message"]


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="needs a shell")
async def test_a_tar_that_fails_late_breaks_the_stream(
    client: httpx.AsyncClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["/bin/sh", "-c", "head -c 3000000 /dev/zero; echo too bad >&2; exit 3", "tar"]
    monkeypatch.setattr("atelier.guest_agent.archive._tar_command", lambda: command)
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get("/archive", params={"path": "."})
    monkeypatch.setattr(
        "atelier.guest_agent.archive._tar_command", lambda: ["/bin/sh", "-c", "echo too bad >&2; exit 3", "tar"]
    )
    early = await client.get("/archive", params={"path": "."})
    assert (early.status_code, "too bad" in early.json()["message"]) == (500, True)


async def test_a_client_that_leaves_ends_the_tar(
    client: httpx.AsyncClient, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = home / "pid"
    command = ["/bin/sh", "-c", f"echo $$ >{mark}; exec cat /dev/zero", "tar"]
    monkeypatch.setattr("atelier.guest_agent.archive._tar_command", lambda: command)
    async with client.stream("GET", "/archive", params={"path": "."}) as response:
        async for _ in response.aiter_bytes():
            break
    pid = int(mark.read_text())
    # A further request is answered only after the server has got rid of the first.
    for _ in range(200):
        await call(client, "Stat", path="")
        if not Path(f"/proc/{pid}").exists():
            break
    assert not Path(f"/proc/{pid}").exists()
