"""The database file: opening, migrating, transactions, group commit, wake-ups, errors in words."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atelier.db import installation, schema
from atelier.db.engine import Connection, Database, Subscription, signal
from atelier.db.tables import SCHEMA_REVISION
from atelier.model.errors import DiskFullError, HostError


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(tmp_path / "data" / "atelier.db")
    made.open()
    yield made
    made.close()


def put(name: str, value: str = "x"):
    def run(connection: Connection) -> str:
        connection.exec_driver_sql("INSERT INTO settings VALUES (?, ?)", (name, value))
        return name

    return run


def names(database: Database) -> list[str]:
    with database.read() as connection:
        return [str(row[0]) for row in connection.exec_driver_sql("SELECT name FROM settings ORDER BY name")]


def form(path: Path) -> set[tuple[str, str]]:
    """Tables with their columns, and indexes; Alembic spells the same table with other white space."""
    with sqlite3.connect(path) as connection:
        objects = connection.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {
        (f"{kind} {name}", " ".join(sql.replace(",", " , ").replace(")", " )").split())) for kind, name, sql in objects
    }


async def test_settings_of_the_connection(database: Database) -> None:
    def pragmas(connection: Connection) -> list[object]:
        return [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]

    assert await database.write(pragmas) == ["wal", 2, 1, 10000]
    assert stat.S_IMODE(database.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(f"{database.path}-wal").stat().st_mode) == 0o600


async def test_what_was_written_is_read_at_once_and_after_reopening(database: Database) -> None:
    assert await database.write(put("a")) == "a"
    assert names(database) == ["a"]
    database.close()
    again = Database(database.path)
    again.open()
    assert names(again) == ["a"]
    again.close()


async def test_an_error_rolls_back_and_is_raised(database: Database) -> None:
    def fail(connection: Connection) -> None:
        put("a")(connection)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await database.write(fail)
    assert names(database) == []


async def test_a_write_never_runs_on_the_event_loop(database: Database) -> None:
    thread = await database.write(lambda connection: threading.current_thread())
    assert thread is not threading.current_thread()


async def test_waiting_writes_share_a_commit_and_stand_or_fall_alone(database: Database) -> None:
    entered, leave = threading.Event(), threading.Event()

    def block(connection: Connection) -> None:
        entered.set()
        leave.wait(20)

    def fail(connection: Connection) -> None:
        put("bad")(connection)
        raise ValueError("mine alone")

    first = asyncio.create_task(database.write(block))
    await asyncio.to_thread(entered.wait, 20)
    others = [asyncio.create_task(database.write(put(f"n{number:03}"))) for number in range(100)]
    others.insert(50, asyncio.create_task(database.write(fail)))
    cancelled = asyncio.create_task(database.write(put("never")))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.sleep(0)
    leave.set()
    await first
    results = await asyncio.gather(*others, return_exceptions=True)
    assert isinstance(results[50], ValueError)
    assert names(database) == [f"n{number:03}" for number in range(100)]


async def test_a_read_sees_one_state_and_cannot_write(database: Database) -> None:
    await database.write(put("a"))
    with database.read() as outer:
        assert outer.exec_driver_sql("SELECT count(*) FROM settings").scalar() == 1
        with sqlite3.connect(database.path) as other:
            other.execute("INSERT INTO settings VALUES ('b', 'x')")
            other.commit()
        with database.read() as inner:
            assert inner.exec_driver_sql("SELECT count(*) FROM settings").scalar() == 1
    assert names(database) == ["a", "b"]
    with pytest.raises(HostError, match="readonly"), database.read() as connection:
        put("c")(connection)
    assert names(database) == ["a", "b"]


async def test_a_long_read_does_not_stop_writes(database: Database) -> None:
    with database.read() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM settings").scalar()
        await database.write(put("a"))
    assert names(database) == ["a"]


async def test_subscribers_wake_after_commit_only(database: Database) -> None:
    def tell(connection: Connection) -> None:
        signal(connection, "topic")

    def tell_and_fail(connection: Connection) -> None:
        signal(connection, "topic")
        raise ValueError

    with database.subscribe("topic") as subscription:
        assert not await woken(subscription, 0.01)
        with pytest.raises(ValueError):
            await database.write(tell_and_fail)
        await database.write(put("other"))
        assert not await woken(subscription, 0.01)
        await database.write(tell)
        assert await woken(subscription, 20)
        subscription.clear()
        assert not await woken(subscription, 0.01)


async def woken(subscription: Subscription, timeout_seconds: float) -> bool:
    try:
        await asyncio.wait_for(subscription.wait(), timeout_seconds)
    except TimeoutError:
        return False
    return True


async def test_a_full_disk_is_said_and_survived(database: Database) -> None:
    def limit(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")

    await database.write(limit)
    writes = [database.write(put(f"big{number}", "x" * 5000)) for number in range(8)]
    results = await asyncio.gather(*writes, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    assert errors
    assert all(isinstance(error, DiskFullError) and error.hint for error in errors)
    kept = [result for result in results if isinstance(result, str)]
    assert names(database) == kept
    await database.write(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 100000"))
    await database.write(put("z"))
    assert names(database) == [*kept, "z"]


async def test_a_foreign_file_and_a_newer_one_are_refused_in_words(tmp_path: Path) -> None:
    noise = tmp_path / "noise.db"
    noise.write_bytes(b"this is no database" * 200)
    with pytest.raises(HostError) as damaged:
        Database(noise).open()
    assert damaged.value.code == "database_damaged"

    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    with pytest.raises(HostError, match="not Atelier's"):
        Database(foreign).open()

    newer = Database(tmp_path / "newer.db")
    newer.open()
    newer.close()
    with sqlite3.connect(newer.path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(HostError) as too_new:
        Database(newer.path).open()
    assert too_new.value.code == "database_too_new"

    with pytest.raises(HostError) as unusable:
        Database(noise / "below-a-file.db").open()
    assert unusable.value.code == "database_unusable"


async def test_closed_is_said(database: Database) -> None:
    database.close()
    database.close()
    with pytest.raises(HostError, match="closed"):
        await database.write(put("a"))
    with pytest.raises(HostError, match="closed"), database.read():
        pass


async def test_migrations_end_in_the_same_tables_as_a_new_file(database: Database, tmp_path: Path) -> None:
    migrated = tmp_path / "migrated.db"
    made = Database(migrated)
    connection = made._connect(migrated)
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    schema.migrate(connection)
    connection.commit()
    connection.close()
    assert {entry for entry in form(migrated) if "alembic" not in entry[0]} == {
        entry for entry in form(database.path) if "alembic" not in entry[0]
    }
    made.open()
    with made.read() as reader:
        assert reader.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == SCHEMA_REVISION
    made.close()


def test_the_newest_migration_is_the_one_that_tables_name() -> None:
    versions = Path(schema.__file__).parent / "migrations" / "versions"
    newest = max(path.name for path in versions.glob("[0-9]*.py"))
    assert newest.startswith(f"{SCHEMA_REVISION}_")


def test_a_start_imports_neither_alembic_nor_the_mapper(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, pathlib\n"
        "from atelier.db.engine import Database\n"
        f"async def main():\n    for _ in range(2):\n        d = Database(pathlib.Path({str(tmp_path / 'a.db')!r}))\n"
        "        d.open()\n        d.close()\n"
        "asyncio.run(main())\n"
        "print([name for name in ('alembic', 'mako', 'sqlalchemy.orm', 'greenlet') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


async def test_installation_ids_are_made_once(database: Database) -> None:
    first = await installation.load_installation(database)
    assert (len(first.installation_id), len(first.host_id)) == (4, 12)
    assert await installation.load_installation(database) == first
