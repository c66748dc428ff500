"""Backups and restores of a data folder, with real databases and real qcow2 volumes."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import sqlite3
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine
from tests.real_machines import missing_programs

from atelier.db import schema
from atelier.db.engine import Connection, Database
from atelier.db.installation import load_installation
from atelier.db.outbox import Outbox
from atelier.db.sandboxes import GuestSecrets, SandboxRepository
from atelier.db.tables import SCHEMA_REVISION
from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.host.files import lock_folder
from atelier.manager import backup_archive
from atelier.manager.backup import Backup, take_backup
from atelier.manager.restore import Restored, restore_backup
from atelier.model.errors import AlreadyRunningError, AtelierError, ConflictError, InvalidRequestError, NotFoundError
from atelier.model.layout import DataLayout
from atelier.model.machine import DiskFile, VolumeRequest
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState

IDS = {"first": "aaaaaaaaaaaa", "second": "bbbbbbbbbbbb", "third": "cccccccccccc"}
BASE = "base-0123456789abcdef.ext4"
NO_QEMU_IMG = missing_programs("qemu-img", "qemu-io")
needs_qemu_img = pytest.mark.skipif(bool(NO_QEMU_IMG), reason=NO_QEMU_IMG)


class Machine:
    """A data folder and an image cache, as a manager leaves them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.data = DataLayout(folder / "data")
        self.data.volumes.mkdir(parents=True)
        self.images = folder / "images"
        self.images.mkdir()
        self.storage = Qcow2Storage(self.data.volumes)

    def start(self, act: Callable[[Database], object] = lambda database: None) -> list[str]:
        """What a manager would find: opens the database; returns the names of its sandboxes."""

        async def run() -> list[str]:
            database = Database(self.data.database)
            database.open()
            try:
                await load_installation(database)
                act(database)
                with database.read() as connection:
                    return sorted(each.name for each in SandboxRepository().list_page(connection, 100)[0])
            finally:
                database.close()

        return asyncio.run(run())

    def add(self, name: str, state: SandboxState = SandboxState.STOPPED) -> None:
        now = datetime.now(UTC)
        made = Sandbox(IDS[name], name, "h" * 12, state, SandboxSpec(), now, now)

        def insert(connection: Connection) -> None:
            SandboxRepository().insert(connection, made, GuestSecrets("t", "m"))
            Outbox(database).append(connection, "k", made.id, {})

        database = Database(self.data.database)

        async def run() -> None:
            database.open()
            await database.write(insert)
            database.close()

        asyncio.run(run())

    def make_disk(self, name: str, fill: int) -> Path:
        """A volume over the base image, with a MiB of ``fill`` in it."""
        base = self.images / BASE
        if not base.exists():
            with base.open("wb") as file:
                file.write(b"the base's first bytes")
                file.truncate(64 * 2**20)
        request = VolumeRequest(IDS[name], DiskFile(base, "raw"), 128)
        path = asyncio.run(self.storage.ensure_volume(request)).top.path
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {fill} 8M 1M", str(path)], check=True)
        return path

    def back_up(self, target: Path, *, with_disks: bool = False, force: bool = False) -> Backup:
        return take_backup(self.data, self.images, target, with_disks=with_disks, force=force)

    def restore(self, archive: Path) -> Restored:
        return restore_backup(self.data, archive)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "machine")
    made.start()
    made.data.token_file.write_text('{"api_url": "http://127.0.0.1:1", "api_key": "atl_first"}')
    return made


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` by the hash of its content, but for those that hold nothing: SQLite's shared memory
    and empty logs, and the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and not path.name.endswith("-shm")
        and not (path.name.endswith("-wal") and path.stat().st_size == 0)
        and path.name != "lock"
    }


def events_after(machine: Machine, event_id: int) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []

    def read(database: Database) -> None:
        with database.read() as connection:
            found.extend((event.id, event.kind) for event in Outbox(database).read_after(connection, event_id, 100))

    machine.start(read)
    return found


# --- the backup -----------------------------------------------------------------------------------------------------


def test_what_is_in_a_backup(machine: Machine, tmp_path: Path) -> None:
    machine.add("first")
    machine.data.disks.volume(IDS["first"]).write_bytes(bytes(5000))
    made = machine.back_up(tmp_path / "b.tar.gz")
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert made.size_bytes == made.path.stat().st_size
    with tarfile.open(made.path) as archive:
        assert archive.getnames() == ["atelier.db", "token.json", "manifest.json"]
        archive.extractall(tmp_path / "out", filter="data")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["sandboxes"]) == (1, 1)
    assert len(manifest["installation_id"]) == 4
    (entry,) = manifest["volumes"]
    assert (entry["name"], entry["size_bytes"]) == ("first", 5000)
    assert entry["left_out"]
    with closing(sqlite3.connect(tmp_path / "out" / "atelier.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar.gz", "machine", "out"], "nothing else is left"


def test_a_backup_amid_writes_is_one_state(machine: Machine, tmp_path: Path) -> None:
    """Each transaction adds a pair; a torn copy would hold half of one, or not be a database at all."""
    writer = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sqlite3, sys\n"
            "c = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)\n"
            "c.execute('PRAGMA wal_autocheckpoint = 200')\n"
            "print('begun', flush=True)\n"
            "for n in range(10**9):\n"
            "    c.execute('BEGIN IMMEDIATE')\n"
            "    for half in 'ab': c.execute('INSERT INTO settings VALUES (?, ?)', (f'{n}{half}', 'x' * 3000))\n"
            "    c.execute('COMMIT')\n",
            str(machine.data.database),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
        pairs = "SELECT substr(name, -1), count(*) FROM settings WHERE value LIKE 'xx%' GROUP BY 1"
        counts: list[int] = []
        for number in range(4):
            with closing(sqlite3.connect(machine.data.database)) as connection:
                done = dict(connection.execute(pairs)).get("a", 0)
            made = machine.back_up(tmp_path / f"{number}.tar.gz")
            with tarfile.open(made.path) as archive:
                archive.extract("atelier.db", tmp_path / str(number), filter="data")
            with closing(sqlite3.connect(tmp_path / str(number) / "atelier.db")) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                halves = dict(connection.execute(pairs))
            assert halves.get("a") == halves.get("b")
            counts.append(halves.get("a", 0))
            assert counts[-1] >= done, "what was in the log only is in it"
        assert writer.poll() is None
        assert counts == sorted(counts) and counts[0] < counts[-1], "it went on all the while"
    finally:
        writer.kill()
        writer.communicate()


def test_a_file_that_exists_is_not_replaced_unasked(machine: Machine, tmp_path: Path) -> None:
    target = tmp_path / "b.tar.gz"
    target.write_text("dear")
    with pytest.raises(ConflictError) as refused:
        machine.back_up(target)
    assert "--force" in refused.value.hint
    assert target.read_text() == "dear"
    machine.back_up(target, force=True)
    assert tarfile.is_tarfile(target)


def test_without_a_database_or_a_place_there_is_no_backup(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        machine.back_up(tmp_path / "absent" / "b.tar.gz")
    with pytest.raises(InvalidRequestError, match="is a folder"):
        machine.back_up(tmp_path)
    machine.data.database.unlink()
    with pytest.raises(NotFoundError) as refused:
        machine.back_up(tmp_path / "b.tar.gz")
    assert refused.value.code == "no_database"
    assert not (tmp_path / "b.tar.gz").exists()


def test_a_damaged_database_is_not_backed_up_as_if_it_were_whole(machine: Machine, tmp_path: Path) -> None:
    machine.add("first")
    with machine.data.database.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(bytes(4096 * 4))
    with pytest.raises(AtelierError) as refused:
        machine.back_up(tmp_path / "b.tar.gz")
    assert refused.value.code == "database_damaged"
    assert [path.name for path in tmp_path.iterdir()] == ["machine"]


# --- disks ----------------------------------------------------------------------------------------------------------


@needs_qemu_img
def test_disks_of_sandboxes_that_rest_come_along_to_another_machine(machine: Machine, tmp_path: Path) -> None:
    machine.add("first", SandboxState.STOPPED)
    machine.add("second", SandboxState.RUNNING)
    machine.add("third", SandboxState.FAILED)
    for number, name in enumerate(IDS, start=1):
        machine.make_disk(name, number)
    made = machine.back_up(tmp_path / "b.tar.gz", with_disks=True)
    left_out = {entry.name: entry.left_out for entry in made.manifest.volumes}
    assert left_out == {"first": "", "second": "it is running", "third": ""}
    assert made.size_bytes < 2**20, "holes and runs cost next to nothing"

    other = Machine(tmp_path / "a-machine-with-a-much-longer-path-to-its-data-folder")
    restored = other.restore(made.path)
    assert sorted(restored.disks_restored) == ["first", "third"]
    assert restored.without_disk == ["second"]
    assert other.start() == ["first", "second", "third"]
    assert json.loads(other.data.token_file.read_text())["api_key"] == "atl_first"
    base = other.data.disks.bases / BASE
    assert base.read_bytes() == (machine.images / BASE).read_bytes()
    assert base.stat().st_blocks * 512 < 2**20, "it has its holes again"
    # The first machine is gone; the disks stand over the base that came along.
    (machine.images / BASE).unlink()
    for number, name in ((1, "first"), (3, "third")):
        path = other.data.disks.volume(IDS[name])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(path)]))
        assert told["backing-filename"] == str(base)
        subprocess.run(["qemu-img", "check", "-q", str(path)], check=True)
        reading = ["qemu-io", "-f", "qcow2", "-r", "-c", f"read -P {number} 8M 1M", "-c", "read -v 0 22", str(path)]
        shown = subprocess.run(reading, capture_output=True, text=True, check=True).stdout
        assert "Pattern verification failed" not in shown
        assert "the.base.s.first" in shown


@needs_qemu_img
def test_disks_of_several_files_come_along_as_one(machine: Machine, tmp_path: Path) -> None:
    """Of a sandbox that was snapshotted, and of one that was made from the snapshot; the snapshot itself stays here."""

    async def take_snapshot() -> None:
        await machine.storage.begin_layer(IDS["first"], "s" * 12)
        await machine.storage.end_layer(IDS["first"], "s" * 12, switched=True)
        snapshot = await machine.storage.ensure_snapshot_disk("s" * 12, IDS["first"])
        await machine.storage.ensure_volume(VolumeRequest(IDS["second"], snapshot.disk.top, 128))

    for name in ("first", "second"):
        machine.add(name)
    paths = [machine.make_disk("first", 1)]
    (machine.images / BASE).chmod(0o444)
    asyncio.run(take_snapshot())
    paths.append(machine.data.disks.volume(IDS["second"]))
    for number, path in enumerate(paths, start=5):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {number} 9M 1M", str(path)], check=True)
    before = contents(machine.data.root)
    made = machine.back_up(tmp_path / "b.tar.gz", with_disks=True)
    assert contents(machine.data.root) == before
    assert [entry.left_out for entry in made.manifest.volumes] == ["", ""]
    with tarfile.open(made.path) as archive:
        volumes = [f"volumes/{path.name}" for path in paths]
        assert [name for name in archive.getnames() if "/" in name] == [f"bases/{BASE}", *volumes]

    other = Machine(tmp_path / "other")
    assert sorted(other.restore(made.path).disks_restored) == ["first", "second"]
    for number, name in ((5, "first"), (6, "second")):
        disk = asyncio.run(other.storage.find_volume(IDS[name]))
        assert disk is not None
        assert [file.path for file in disk.backing] == [other.data.disks.bases / BASE]
        reading = ["-c", "read -P 1 8M 1M", "-c", f"read -P {number} 9M 1M", "-c", "read -v 0 22"]
        shown = subprocess.check_output(["qemu-io", "-f", "qcow2", "-r", *reading, str(disk.top.path)], text=True)
        assert "Pattern verification failed" not in shown
        assert "the.base.s.first" in shown

    # Names of others' layers are obeyed no more than those of other files.
    stolen = machine.data.disks.layer(IDS["first"], "s" * 12, 1)
    rebasing = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(stolen), str(paths[1])]
    subprocess.run(rebasing, check=True)
    tampered = machine.back_up(tmp_path / "c.tar.gz", with_disks=True)
    assert [bool(entry.left_out) for entry in tampered.manifest.volumes] == [False, True]
    assert str(stolen) in tampered.manifest.volumes[1].left_out


@needs_qemu_img
def test_a_header_that_names_a_file_of_the_host_is_not_obeyed(machine: Machine, tmp_path: Path) -> None:
    """A VMM that was taken over can write its disk's header."""
    machine.add("first")
    path = machine.make_disk("first", 1)
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(path)], check=True)
    made = machine.back_up(tmp_path / "b.tar.gz", with_disks=True)
    (entry,) = made.manifest.volumes
    assert str(secret) in entry.left_out
    with tarfile.open(made.path) as archive:
        assert archive.getnames() == ["atelier.db", "token.json", "manifest.json"]


@needs_qemu_img
def test_a_disk_that_changes_while_it_is_copied_is_left_out(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.add("first")
    path = machine.make_disk("first", 1)
    original = backup_archive.ArchiveWriter.add

    def add_and_write(self: backup_archive.ArchiveWriter, name: str, *rest: object, **options: object) -> None:
        original(self, name, *rest, **options)  # type: ignore[arg-type]
        if name.startswith("volumes/"):
            with path.open("ab") as file:
                file.write(b"x")

    monkeypatch.setattr(backup_archive.ArchiveWriter, "add", add_and_write)
    made = machine.back_up(tmp_path / "b.tar.gz", with_disks=True)
    assert "changed" in made.manifest.volumes[0].left_out
    other = Machine(tmp_path / "other")
    assert other.restore(made.path).disks_restored == []
    assert not other.data.disks.volume(IDS["first"]).exists()


# --- the restore ----------------------------------------------------------------------------------------------------


@needs_qemu_img
def test_an_older_backup_costs_nobody_a_disk(machine: Machine, tmp_path: Path) -> None:
    """Restored while newer sandboxes exist: every volume stays, byte by byte, those without a row as well."""
    machine.add("first")
    machine.make_disk("first", 1)
    made = machine.back_up(tmp_path / "b.tar.gz", with_disks=True)
    machine.make_disk("first", 9)
    machine.add("second")
    machine.add("third", SandboxState.RUNNING)
    for number, name in enumerate(("second", "third"), start=2):
        machine.make_disk(name, number)
    before = contents(machine.data.volumes)
    assert len(before) == 4, "three volumes and the base that they stand over"

    restored = machine.restore(made.path)
    assert machine.start() == ["first"]
    assert contents(machine.data.volumes) == before
    assert restored.disks_kept == ["first"], "it is newer than the one in the backup"
    assert restored.unowned_disks == [f"{IDS['second']}.qcow2", f"{IDS['third']}.qcow2"]
    assert restored.replaced is not None
    with closing(sqlite3.connect(restored.replaced)) as connection:
        names = {row[0] for row in connection.execute("SELECT name FROM sandboxes")}
    assert names == {"first", "second", "third"}


def test_what_is_in_the_log_is_kept_with_the_database_that_is_replaced(machine: Machine, tmp_path: Path) -> None:
    made = machine.back_up(tmp_path / "b.tar.gz")
    crash = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
        "c.execute(\"INSERT INTO settings VALUES ('late', 'x')\"); c.commit(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", crash, str(machine.data.database)], check=True)
    assert Path(f"{machine.data.database}-wal").stat().st_size > 0
    restored = machine.restore(made.path)
    assert restored.replaced is not None
    assert not Path(f"{restored.replaced}-wal").exists()
    with closing(sqlite3.connect(restored.replaced)) as connection:
        assert connection.execute("SELECT value FROM settings WHERE name = 'late'").fetchone() == ("x",)
    with closing(sqlite3.connect(machine.data.database)) as connection:
        assert connection.execute("SELECT value FROM settings WHERE name = 'late'").fetchone() is None


def test_a_damaged_database_is_kept_byte_by_byte(machine: Machine, tmp_path: Path) -> None:
    machine.add("first")
    made = machine.back_up(tmp_path / "b.tar.gz")
    machine.data.database.write_bytes(b"no database" * 1000)
    Path(f"{machine.data.database}-wal").write_bytes(b"no log" * 1000)
    restored = machine.restore(made.path)
    assert restored.replaced is not None
    assert restored.replaced.read_bytes() == b"no database" * 1000
    assert Path(f"{restored.replaced}-wal").read_bytes() == b"no log" * 1000
    assert machine.start() == ["first"]


def test_the_key_that_is_there_stays(machine: Machine, tmp_path: Path) -> None:
    made = machine.back_up(tmp_path / "b.tar.gz")
    machine.data.token_file.write_text('{"api_key": "atl_second"}')
    assert machine.restore(made.path).key_kept
    assert "atl_second" in machine.data.token_file.read_text()


def test_event_ids_are_never_used_again(machine: Machine, tmp_path: Path) -> None:
    """A client that saw later events than the backup holds resumes, and is told."""
    machine.add("first")
    made = machine.back_up(tmp_path / "b.tar.gz")
    machine.add("second")
    machine.add("third")
    seen = events_after(machine, 0)[-1][0]
    machine.restore(made.path)
    ((first, kind),) = events_after(machine, seen)
    assert (first > seen, kind) == (True, "installation.restored")
    machine.restore(made.path)
    ((second, _),) = events_after(machine, seen)
    assert second > first


def test_a_backup_of_an_older_form_is_migrated_at_the_next_start(machine: Machine, tmp_path: Path) -> None:
    machine.data.database.unlink()
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    with create_engine(f"sqlite:///{machine.data.database}").begin() as connection:
        configuration.attributes["connection"] = connection
        command.upgrade(configuration, "0001")
        connection.exec_driver_sql("INSERT INTO settings VALUES ('installation_id', 'abcd')")
    made = machine.back_up(tmp_path / "b.tar.gz")
    assert made.manifest.schema_revision == "0001"
    other = Machine(tmp_path / "other")
    other.restore(made.path)
    assert other.start() == []
    with closing(sqlite3.connect(other.data.database)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (SCHEMA_REVISION,)
        assert connection.execute("SELECT value FROM settings WHERE name = 'installation_id'").fetchone() == ("abcd",)


def test_a_running_manager_is_in_the_way(machine: Machine, tmp_path: Path) -> None:
    made = machine.back_up(tmp_path / "b.tar.gz")
    with lock_folder(machine.data.lock_file):
        before = contents(machine.data.root)
        with pytest.raises(AlreadyRunningError) as refused:
            machine.restore(made.path)
        assert contents(machine.data.root) == before
    assert "stop it first" in refused.value.hint


def repack(source: Path, target: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """An archive with other members than a backup wrote."""
    with tarfile.open(source) as archive:
        members = {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]
    change(members)
    with tarfile.open(target, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return target


def edit_manifest(members: dict[str, bytes], **values: object) -> None:
    members["manifest.json"] = json.dumps({**json.loads(members["manifest.json"]), **values}).encode()


def set_version(members: dict[str, bytes]) -> None:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(members["atelier.db"])
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    members["atelier.db"] = connection.serialize()


def zero_a_page(members: dict[str, bytes]) -> None:
    database = members["atelier.db"]
    members["atelier.db"] = database[:4096] + bytes(8192) + database[12288:]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda members: members.update({"../outside": b"x"}), "backup_damaged"),
        (lambda members: members.update({"/absolute": b"x"}), "backup_damaged"),
        (lambda members: members.update({"volumes/../../x.qcow2": b"x"}), "backup_damaged"),
        (lambda members: members.update({"notes.txt": b"x"}), "backup_damaged"),
        (lambda members: members.pop("atelier.db"), "backup_damaged"),
        (lambda members: members.pop("manifest.json"), "backup_damaged"),
        (lambda members: members.update({"token.json": members.pop("token.json")}), "backup_damaged"),
        (lambda members: edit_manifest(members, installation_id="zzzz"), "backup_damaged"),
        (lambda members: edit_manifest(members, format_version=2), "backup_too_new"),
        (lambda members: edit_manifest(members, volumes=7), "backup_damaged"),
        (
            lambda members: edit_manifest(
                members,
                volumes=[{"sandbox_id": "../../x", "name": "n", "state": "s", "size_bytes": 1, "used_bytes": 1}],
            ),
            "backup_damaged",
        ),
        (zero_a_page, "database_damaged"),
        (set_version, "database_too_new"),
        (lambda members: members.update({"atelier.db": b"no database" * 100}), "database_damaged"),
    ],
)
def test_what_is_no_good_is_refused_and_changes_nothing(
    machine: Machine, tmp_path: Path, change: Callable[[dict[str, bytes]], object], code: str
) -> None:
    made = machine.back_up(tmp_path / "b.tar.gz")
    machine.add("first")
    before = contents(machine.data.root)
    with pytest.raises(AtelierError) as refused:
        machine.restore(repack(made.path, tmp_path / "changed.tar.gz", change))
    assert refused.value.code == code
    assert "nothing was changed" in refused.value.hint
    assert "changed.tar.gz" in refused.value.message
    assert contents(machine.data.root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar.gz", "changed.tar.gz", "machine"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_only_plain_files_are_taken(machine: Machine, tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "links.tar.gz", "w:gz") as archive:
        header = tarfile.TarInfo("atelier.db")
        header.type, header.linkname = kind, "/etc/passwd"
        archive.addfile(header)
    with pytest.raises(InvalidRequestError) as refused:
        machine.restore(tmp_path / "links.tar.gz")
    assert refused.value.code == "backup_damaged"


def test_an_archive_that_is_cut_off_spoilt_or_huge_is_refused(machine: Machine, tmp_path: Path) -> None:
    whole = machine.back_up(tmp_path / "b.tar.gz").path.read_bytes()
    before = contents(machine.data.root)
    middle = len(whole) // 2
    header = tarfile.TarInfo("token.json")
    header.size = 2**40
    for number, content in enumerate(
        (
            b"",
            b"plain text",
            whole[:middle],
            whole[:-9],
            whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
            gzip.compress(header.tobuf(tarfile.GNU_FORMAT)),
            gzip.compress(b"x" * 5000),
        )
    ):
        spoilt = tmp_path / f"spoilt{number}"
        spoilt.write_bytes(content)
        with pytest.raises(InvalidRequestError) as refused:
            machine.restore(spoilt)
        assert refused.value.code == "backup_damaged", number
    assert contents(machine.data.root) == before


CRASHED = 77
_CHANGES = frozenset({"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"})


def crash_in_a_child(step: int, act: Callable[[], object]) -> bool:
    """Run ``act`` in a forked child that ends, as by ``kill -9``, before its change number ``step`` to the file system
    (a file opened for writing and a database opened count too). Returns whether it came that far."""
    pid = os.fork()
    if pid == 0:
        left = step

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in _CHANGES or event == "sqlite3.connect" or writes:
                left -= 1
                if left == 0:
                    os._exit(CRASHED)

        try:
            sys.addaudithook(count)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, CRASHED), f"it failed at step {step}"
    return status == CRASHED


@needs_qemu_img
def test_a_crash_anywhere_leaves_the_old_state_or_the_new_one(machine: Machine, tmp_path: Path) -> None:
    machine.add("first")
    machine.make_disk("first", 1)
    made = machine.back_up(tmp_path / "b.tar.gz", with_disks=True)
    machine.data.disks.volume(IDS["first"]).unlink()
    machine.add("second")
    own = machine.make_disk("second", 2)
    before = own.read_bytes()
    seen: list[list[str]] = []
    step = 1
    while crash_in_a_child(step, lambda: machine.restore(made.path)):
        seen.append(machine.start())
        assert own.read_bytes() == before
        if seen[-1] == ["first"]:
            assert machine.data.disks.volume(IDS["first"]).exists(), "its disk was there before the row was"
            break
        step += 1
    else:
        assert machine.start() == ["first"]
    assert len(seen) > 15
    assert all(names in (["first", "second"], ["first"]) for names in seen)
    machine.restore(made.path)
    assert machine.start() == ["first"]
    assert own.read_bytes() == before
    left = {path.name for path in machine.data.root.iterdir() if path.name.startswith(".")}
    assert left == set(), "what a crash left half-way is gone"
    kept = [path.stat().st_ino for path in machine.data.root.glob("atelier.db.replaced-*")]
    assert len(kept) == len(set(kept)), "none is a second name of another"


def test_a_crash_on_a_new_machine_leaves_nothing_or_all(machine: Machine, tmp_path: Path) -> None:
    machine.add("first")
    made = machine.back_up(tmp_path / "b.tar.gz")
    step, new = 1, 0
    while True:
        other = Machine(tmp_path / f"other{step}")
        crashed = crash_in_a_child(step, lambda other=other: other.restore(made.path))
        names = other.start()
        assert names in ([], ["first"])
        new += names == ["first"]
        if not crashed:
            break
        step += 1
    assert names == ["first"]
    assert step > 10 and new < step


def test_a_crash_of_a_backup_leaves_no_half_of_one(machine: Machine, tmp_path: Path) -> None:
    step = 1
    target = tmp_path / "b.tar.gz"
    while crash_in_a_child(step, lambda: machine.back_up(target)):
        if target.exists():
            machine.restore(target)
            target.unlink()
        step += 1
    assert step > 5
    machine.restore(target)
