"""``atelier up`` on a database that it cannot use: it says why and what to do, and leaves every byte as it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.running_manager import run_manager, start_manager, stop_manager

AN_ORDINARY_USER = 54321
"""Nobody's: it needs no passwd entry."""


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """The data folder of a manager that was killed with work in its write-ahead log: ``data`` below it."""
    with tempfile.TemporaryDirectory(prefix="atl-") as name:
        folder = Path(name)
        running = start_manager(folder)
        with running.client() as client:
            for number in range(40):
                body = {"name": f"box{number}", "labels": {"filler": "x" * 200}}
                client.post("/api/v1/sandboxes", params={"wait": True}, json=body).raise_for_status()
        running.process.kill()
        running.process.wait()
        assert (folder / "data" / "atelier.db-wal").stat().st_size > 0
        yield folder


@pytest.fixture
def folder(template: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="atl-") as name:
        shutil.copytree(template / "data", Path(name) / "data")
        yield Path(name)


def fold_log_in(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def hashes(data: Path) -> dict[str, str]:
    """Every file that belongs to the database, but for what holds nothing: the shared memory, and an empty log."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in data.iterdir()
        if path.name.startswith("atelier.db")
        and not path.name.endswith("-shm")
        and not (path.name.endswith("-wal") and path.stat().st_size == 0)
    }


def run_up(folder: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ATELIER_DATA_DIR": str(folder / "data"),
        "ATELIER_RUN_DIR": str(folder / "run"),
        "ATELIER_CACHE_DIR": str(folder / "cache"),
    }
    return run_manager(environment, "--mode", "mock", "--listen", "127.0.0.1:0", within=prefix)


def refusal(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """The error and the hint, which are all that was said."""
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: "), done.stderr
    return lines[0], lines[1]


def truncate(database: Path) -> None:
    fold_log_in(database)
    os.truncate(database, database.stat().st_size // 2)


def truncate_to_nothing(database: Path) -> None:
    os.truncate(database, 0)


def zero_the_middle(database: Path) -> None:
    fold_log_in(database)
    size = database.stat().st_size
    with database.open("r+b") as file:
        file.seek(size // 2 // 4096 * 4096)
        file.write(bytes(8192))


def write_something_else(database: Path) -> None:
    database.write_bytes(b"Dear diary, today I learned about databases.\n" * 500)


def take_the_log_of_another(database: Path) -> None:
    """A whole one, with every page of its own database in it."""
    fold_log_in(database)
    with tempfile.TemporaryDirectory() as name:
        other = start_manager(Path(name))
        with closing(sqlite3.connect(other.data_dir / "atelier.db", isolation_level=None)) as connection:
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("VACUUM")
            shutil.copy(other.data_dir / "atelier.db-wal", f"{database}-wal")
        assert stop_manager(other) == 0


def drop_a_table(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("DROP TABLE sandboxes")


def drop_a_column(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("ALTER TABLE sandboxes DROP COLUMN state")


def drop_the_version(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("DROP TABLE alembic_version")


def put_somebody_elses(database: Path) -> None:
    for ending in ("", "-wal", "-shm"):
        Path(f"{database}{ending}").unlink(missing_ok=True)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")


def lose_it_but_not_its_log(database: Path) -> None:
    database.unlink()


def come_from_the_future(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()


def become_a_folder(database: Path) -> None:
    for ending in ("", "-wal", "-shm"):
        Path(f"{database}{ending}").unlink(missing_ok=True)
    database.mkdir()


@pytest.mark.parametrize(
    ("spoil", "error", "hint"),
    [
        (truncate, "is damaged", "atelier restore"),
        (truncate_to_nothing, "the file is empty", "atelier restore"),
        (zero_the_middle, "is damaged", "atelier restore"),
        (write_something_else, "not an SQLite database", "atelier restore"),
        (take_the_log_of_another, "belongs to another database", "move atelier.db-wal away"),
        (drop_a_table, "the table sandboxes is missing", "atelier restore"),
        (drop_a_column, "columns of the table sandboxes are missing: state", "atelier restore"),
        (drop_the_version, "the table alembic_version is missing", "atelier restore"),
        (put_somebody_elses, "not Atelier's", "move atelier.db"),
        (lose_it_but_not_its_log, "is missing, but its log", "atelier restore"),
        (come_from_the_future, "newer Atelier", "install that version again"),
        (become_a_folder, "is a folder", "move it away"),
    ],
)
def test_what_cannot_be_used_is_said_and_kept(
    folder: Path, spoil: Callable[[Path], None], error: str, hint: str
) -> None:
    spoil(folder / "data" / "atelier.db")
    before = hashes(folder / "data")
    said, remedy = refusal(run_up(folder))
    assert error in said
    assert hint in remedy
    assert hashes(folder / "data") == before


def test_a_healthy_one_with_work_in_its_log_starts(folder: Path) -> None:
    running = start_manager(folder)
    with running.client() as client:
        assert len(client.get("/api/v1/sandboxes", params={"limit": 500}).json()["items"]) == 40
    assert stop_manager(running) == 0


def test_a_locked_one_is_said_and_kept(folder: Path) -> None:
    database = folder / "data" / "atelier.db"
    # A process of its own: this one would lose its locks as soon as it opened and closed the file again to hash it.
    holds = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        before = hashes(folder / "data")
        said, remedy = refusal(run_up(folder))
        assert "locked" in said and "the other program" in remedy
        assert hashes(folder / "data") == before
    finally:
        other.kill()
        other.communicate()


@pytest.fixture(scope="module")
def ordinary_user() -> list[str]:
    """The command that runs a program as a user who does not get past modes."""
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", f"--reuid={AN_ORDINARY_USER}", f"--regid={AN_ORDINARY_USER}", "--clear-groups", "--"]
    probe = [*prefix, sys.executable, "-c", "import atelier.manager.__main__"]
    if shutil.which("setpriv") is None or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("an ordinary user cannot run this checkout")
    return prefix


@pytest.fixture
def as_ordinary_user(folder: Path, ordinary_user: list[str]) -> list[str]:
    """As ``ordinary_user``; ``folder`` is that user's."""
    if ordinary_user:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, AN_ORDINARY_USER, AN_ORDINARY_USER)
    return ordinary_user


def test_a_file_that_may_only_be_read(folder: Path, as_ordinary_user: list[str]) -> None:
    (folder / "data" / "atelier.db").chmod(0o400)
    before = hashes(folder / "data")
    said, remedy = refusal(run_up(folder, *as_ordinary_user))
    assert "atelier.db" in said and "Permission denied" in said
    assert "permissions" in remedy
    assert hashes(folder / "data") == before


def test_a_file_that_may_not_be_read(folder: Path, as_ordinary_user: list[str]) -> None:
    (folder / "data" / "atelier.db").chmod(0)
    before = hashes(folder / "data")
    said, remedy = refusal(run_up(folder, *as_ordinary_user))
    assert "atelier.db" in said and "Permission denied" in said
    assert "permissions" in remedy
    assert hashes(folder / "data") == before


def test_an_immutable_file(folder: Path) -> None:
    database = folder / "data" / "atelier.db"
    if subprocess.run(["chattr", "+i", str(database)], capture_output=True).returncode != 0:
        pytest.skip("chattr +i needs root and a file system that knows it")
    try:
        before = hashes(folder / "data")
        said, remedy = refusal(run_up(folder))
        assert "atelier.db" in said and "not permitted" in said
        assert "permissions" in remedy
        assert hashes(folder / "data") == before
    finally:
        subprocess.run(["chattr", "-i", str(database)], check=True)


@pytest.mark.parametrize("what", ["data", "data/atelier.db"])
def test_a_read_only_file_system(folder: Path, what: str) -> None:
    """In a mount namespace of its own, so that the mount ends with the program."""
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    prefix = ["unshare", "--mount", "--", "sh", "-c", script, "sh", str(folder / what)]
    if os.geteuid() != 0 or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("mounting in a namespace of its own needs root")
    before = hashes(folder / "data")
    said, remedy = refusal(run_up(folder, *prefix))
    assert "Read-only file system" in said
    assert "read-only" in remedy
    assert hashes(folder / "data") == before


@pytest.fixture
def tiny(folder: Path) -> Iterator[Path]:
    """As ``folder``, with the data on a file system of 2 MiB."""
    shutil.move(folder / "data", folder / "kept")
    (folder / "data").mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(folder / "data")]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder / "data")], check=True)


def fill(data: Path, *, but_bytes: int = 0) -> None:
    found = os.statvfs(data)
    (data / "filler").write_bytes(bytes(max(0, found.f_bavail * found.f_frsize - but_bytes)))


def test_a_full_disk_at_the_first_start_leaves_no_half_made_database(tiny: Path) -> None:
    fill(tiny / "data", but_bytes=40 * 1024)
    said, remedy = refusal(run_up(tiny))
    assert "no space" in said or "disk is full" in said
    assert "free" in remedy
    assert hashes(tiny / "data") == {}
    (tiny / "data" / "filler").unlink()
    running = start_manager(tiny)
    assert stop_manager(running) == 0


def test_a_full_disk_at_a_later_start(tiny: Path) -> None:
    fold_log_in(tiny / "kept" / "atelier.db")
    shutil.copy(tiny / "kept" / "atelier.db", tiny / "data")
    fill(tiny / "data")
    before = hashes(tiny / "data")
    said, remedy = refusal(run_up(tiny))
    assert "no space" in said or "disk is full" in said
    assert "free" in remedy
    assert hashes(tiny / "data") == before


def test_a_disk_that_fills_up_while_the_manager_runs(tiny: Path) -> None:
    """Writing is refused in the one form of errors, reading goes on, and all is well when there is room again."""
    running = start_manager(tiny)
    with running.client() as client:
        client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "before"}).raise_for_status()
        fill(tiny / "data")
        refused = None
        made = ["before"]
        for number in range(300):
            # The write-ahead log has room of its own before it has to grow.
            answer = client.post("/api/v1/sandboxes", json={"name": f"during{number}", "labels": {"filler": "x" * 200}})
            if answer.status_code >= 400:
                refused = answer
                break
            made.append(f"during{number}")
        assert refused is not None, "the disk never was full"
        assert refused.status_code == 507, refused.text
        body = refused.json()
        assert set(body) == {"code", "message", "hint"}
        assert body["code"] == "disk_full"
        assert "free" in body["hint"]
        listed = client.get("/api/v1/sandboxes", params={"limit": 500})
        assert {row["name"] for row in listed.json()["items"]} == set(made), "what was refused never was"
        assert client.get("/health").status_code == 200

        (tiny / "data" / "filler").unlink()
        client.post("/api/v1/sandboxes", params={"wait": True}, json={"name": "after"}).raise_for_status()
        for name in [*made, "after"]:
            assert client.delete(f"/api/v1/sandboxes/{name}", params={"wait": True}).status_code == 204, name
    assert stop_manager(running) == 0
    assert "Traceback" not in running.log.read_text()
    assert json.loads((tiny / "data" / "token.json").read_text())["api_key"] == running.key
    with closing(sqlite3.connect(tiny / "data" / "atelier.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
