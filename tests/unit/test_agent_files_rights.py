"""The agent is root, its users are not: what the kernel refuses a user, the agent refuses too."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import tarfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_files_server import GUEST_UID, call, file_services

from atelier.guest_agent.credentials import acting_as
from atelier.guest_agent.users import User

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can act for others")
OCTETS = {"content-type": "application/octet-stream"}
USER = User("user", GUEST_UID, GUEST_UID, "/", "/bin/sh", (GUEST_UID, GUEST_UID + 1))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, GUEST_UID, GUEST_UID)
    return home


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "secret"
    folder.mkdir(mode=0o700)
    (folder / "file").write_text("of root alone")
    return folder


@pytest.fixture
async def client(tmp_path: Path, home: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with file_services(tmp_path, home, default_user="user") as client:
        yield client


async def test_ids_and_capabilities_change_for_this_thread_alone() -> None:
    def effective() -> tuple[int, int, list[int], str]:
        status = Path("/proc/thread-self/status").read_text()
        return os.geteuid(), os.getegid(), sorted(os.getgroups()), status.partition("CapEff:")[2].split()[0]

    before = effective()
    seen: list[object] = []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        seen.append(effective())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with acting_as(USER):
        # The file of another process' thread is closed to the user, so it is asked by its number here.
        assert (os.geteuid(), os.getegid(), sorted(os.getgroups())) == (
            GUEST_UID,
            GUEST_UID,
            [GUEST_UID, GUEST_UID + 1],
        )
        assert effective()[3] == "0" * 16
        assert os.getuid() == 0
        inside.set()
        done.wait()
    thread.join()
    assert effective() == before
    assert seen == [before]


async def test_rights_come_back_after_an_error() -> None:
    with pytest.raises(PermissionError), acting_as(USER):
        Path("/etc/shadow").read_bytes()
    assert os.geteuid() == 0
    assert Path("/etc/shadow").read_bytes()


async def test_no_reading_of_what_is_closed(client: httpx.AsyncClient, home: Path, secret: Path) -> None:
    (home / "link").symlink_to("/etc/shadow")
    (home / "folder").symlink_to(secret)
    for path in ("/etc/shadow", "link", str(secret / "file"), "folder/file", f"/proc/self/root{secret}/file"):
        got = await client.get("/files", params={"path": path})
        assert got.status_code == 403, path
        assert "alone" not in got.text
        as_root = await client.get("/files", params={"path": path, "username": "root"})
        assert as_root.status_code == 200
    assert (await call(client, "Stat", path=str(secret / "file"))).status_code == 403
    assert (await call(client, "ListDir", path=str(secret))).status_code == 403
    assert (await client.get("/archive", params={"path": str(secret)})).status_code == 403
    assert (await call(client, "CreateWatcher", path=str(secret))).status_code == 403
    assert (await client.get("/files", params={"path": "/proc/1/environ"})).status_code == 403


async def test_no_writing_where_it_is_closed(client: httpx.AsyncClient, home: Path, secret: Path) -> None:
    (home / "link").symlink_to(secret / "new")
    (home / "folder").symlink_to(secret)
    (home.parent / "of-root").write_text("root's")
    for path in (
        "/root/x",
        "/etc/passwd",
        "link",
        "folder/new",
        str(home.parent / "of-root"),
        "/proc/sys/kernel/hostname",
    ):
        answer = await client.post("/files", params={"path": path}, content=b"x", headers=OCTETS)
        assert answer.status_code == 403, (path, answer.text)
    for procedure, message in (
        ("MakeDir", {"path": str(secret / "d")}),
        ("MakeDir", {"path": "/root/d"}),
        ("Remove", {"path": str(secret)}),
        ("Remove", {"path": str(secret / "file")}),
        ("Move", {"source": str(secret / "file"), "destination": "mine"}),
        ("Move", {"source": "folder", "destination": str(secret / "there")}),
    ):
        answer = await call(client, procedure, **message)
        assert answer.status_code == 403, (procedure, message, answer.text)
    assert os.listdir(secret) == ["file"]
    assert (await client.post("/archive", params={"path": str(secret)}, content=a_tar("x"))).status_code in (400, 403)
    assert os.listdir(secret) == ["file"]


async def test_a_file_that_the_user_may_not_write_is_not_replaced(client: httpx.AsyncClient, home: Path) -> None:
    (home / "of-root").write_text("root's")
    answer = await client.post("/files", params={"path": "of-root"}, content=b"x", headers=OCTETS)
    assert answer.status_code == 403
    assert (home / "of-root").read_text() == "root's"


async def test_what_is_made_belongs_to_the_user(client: httpx.AsyncClient, home: Path) -> None:
    await client.post("/files", params={"path": "a/b/f"}, content=b"x", headers=OCTETS)
    await client.post("/files", files=[("file", ("m", b"x"))])
    await call(client, "MakeDir", path="d/e")
    assert (await client.post("/archive", params={"path": "t"}, content=a_tar("inner"))).status_code == 200
    for name in ("a", "a/b", "a/b/f", "m", "d", "d/e", "t", "t/inner"):
        status = (home / name).stat()
        assert (status.st_uid, status.st_gid) == (GUEST_UID, GUEST_UID), name
    assert (home / "t/inner").read_text() == "content"
    answer = await client.post("/files", params={"path": "of-root", "username": "root"}, content=b"x", headers=OCTETS)
    assert answer.json()[0]["entry"]["owner"] == "root"


async def test_supplementary_groups_count(client: httpx.AsyncClient, home: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.write_text("for the staff")
    os.chown(shared, 0, GUEST_UID + 1)
    shared.chmod(0o640)
    assert (await client.get("/files", params={"path": str(shared)})).text == "for the staff"
    got = await client.get("/archive", params={"path": "."})
    assert got.status_code == 200


async def test_many_at_once_keep_their_own_rights(client: httpx.AsyncClient, home: Path, secret: Path) -> None:
    async def one(number: int) -> int:
        name = "root" if number % 2 else "user"
        got = await client.get("/files", params={"path": str(secret / "file"), "username": name})
        return got.status_code

    assert await asyncio.gather(*(one(number) for number in range(60))) == [403, 200] * 30


async def test_unknown_users_are_refused(client: httpx.AsyncClient) -> None:
    assert (await client.get("/files", params={"path": "x", "username": "nobody-here"})).status_code == 401
    assert (await call(client, "Stat", user="nobody-here", path="/")).status_code == 401


def a_tar(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 7
        entry.uid = 4242
        archive.addfile(entry, io.BytesIO(b"content"))
    return buffer.getvalue()
