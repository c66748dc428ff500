"""The network columns of the table of sandboxes, those of older databases included."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from atelier.db.engine import Connection, Database
from atelier.db.examination import examine
from atelier.db.sandbox_networks import SandboxNetwork, SandboxNetworkRepository
from atelier.db.sandboxes import GuestSecrets, SandboxRepository
from atelier.db.schema import migrate
from atelier.db.tables import SCHEMA_REVISION
from atelier.model.errors import NotFoundError
from atelier.model.ids import new_sandbox_id
from atelier.model.machine import GuestAddress
from atelier.model.network_policy import CLOSED_POLICY, OPEN_POLICY, EgressMode, EgressPolicy, NetworkPolicy
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState

POLICY = NetworkPolicy(EgressPolicy.make(EgressMode.LIST, ["10.1.0.0/16"], ["*.example.com"]), 1000, None)
ADDRESS = GuestAddress("10.64.0.2", 16, "10.64.0.1", "10.64.0.1")

networks = SandboxNetworkRepository()
sandboxes = SandboxRepository()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(tmp_path / "atelier.db")
    made.open()
    yield made
    made.close()


async def add(database: Database, name: str, state: SandboxState = SandboxState.RUNNING) -> str:
    now = datetime.now(UTC)
    made = Sandbox(new_sandbox_id(), name, "host", state, SandboxSpec(), now, now)
    await database.write(lambda connection: sandboxes.insert(connection, made, GuestSecrets("t" * 32, "m" * 32)))
    return made.id


def read(database: Database, sandbox_id: str) -> SandboxNetwork:
    with database.read() as connection:
        return networks.get(connection, sandbox_id)


async def test_policies_come_back_as_they_went_in(database: Database) -> None:
    one = await add(database, "one")
    assert read(database, one) == SandboxNetwork(OPEN_POLICY, False, None, "", "")
    for policy in (POLICY, CLOSED_POLICY, OPEN_POLICY, NetworkPolicy(upload_kbit_per_second=64)):

        def write(connection: Connection, policy: NetworkPolicy = policy) -> None:
            networks.set_policy(connection, one, policy, is_pending=True)

        await database.write(write)
        assert (read(database, one).policy, read(database, one).is_pending) == (policy, True)
        await database.write(lambda connection: networks.mark_in_force(connection, one))
        assert (read(database, one).policy, read(database, one).is_pending) == (policy, False)
    with database.read() as connection, pytest.raises(NotFoundError):
        networks.get(connection, "absent")


async def test_addresses_go_with_the_lease(database: Database) -> None:
    one = await add(database, "one")
    await database.write(lambda connection: sandboxes.take_lease(connection, one, None))
    await database.write(lambda connection: networks.set_address(connection, one, ADDRESS))
    assert read(database, one) == SandboxNetwork(OPEN_POLICY, False, 0, "10.64.0.2", "10.64.0.1")
    with database.read() as connection:
        assert networks.list_leased(connection) == [one]
    await database.write(lambda connection: sandboxes.release_lease(connection, one))
    assert read(database, one) == SandboxNetwork(OPEN_POLICY, False, None, "", "")


async def test_what_is_pending_is_listed_but_not_what_is_being_destroyed(database: Database) -> None:
    made = [await add(database, "one"), await add(database, "two"), await add(database, "x", SandboxState.DESTROYING)]

    def write(connection: Connection) -> None:
        for each in (made[0], made[2]):
            networks.set_policy(connection, each, POLICY, is_pending=True)

    await database.write(write)
    with database.read() as connection:
        assert networks.list_pending(connection) == [made[0]]


async def test_rows_of_an_older_database_read_as_the_open_policy(database: Database, tmp_path: Path) -> None:
    one = await add(database, "one")
    older = tmp_path / "older.db"
    with closing(create_engine(f"sqlite:///{older}").connect()) as connection, connection.begin():
        migrate(connection, "0002")
    with closing(sqlite3.connect(older)) as connection, connection:
        columns = ",".join(name for _, name, *_ in connection.execute("PRAGMA table_info(sandboxes)"))
        connection.execute("ATTACH ? AS newest", (str(database.path),))
        connection.execute(f"INSERT INTO sandboxes ({columns}) SELECT {columns} FROM newest.sandboxes")
    assert examine(older, thorough=True).revision == "0002"
    again = Database(older)
    again.open()
    try:
        assert read(again, one) == SandboxNetwork(OPEN_POLICY, False, None, "", "")
        await again.write(lambda connection: networks.set_policy(connection, one, POLICY, is_pending=False))
        assert read(again, one).policy == POLICY
    finally:
        again.close()
    assert examine(older, thorough=True).revision == SCHEMA_REVISION
