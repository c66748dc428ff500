"""Which form the database file has, and bringing it to this version's.

Called by ``engine`` once per start. Importing Alembic costs time and memory, so it is loaded only for a file of an older
version; a new file is made from ``tables`` at once (a test proves that both ways end in the same tables).
"""

from __future__ import annotations

from sqlalchemy import Connection, inspect

from atelier.db.tables import SCHEMA_REVISION, metadata
from atelier.model.errors import HostError


def ensure_current(connection: Connection) -> None:
    """Inside the caller's transaction: create all tables, or migrate older ones. Raises HostError for a newer file."""
    names = inspect(connection).get_table_names()
    if "alembic_version" not in names:
        if names:
            raise HostError(
                "the database file holds tables that are not Atelier's",
                code="database_damaged",
                hint="move atelier.db away from ATELIER_DATA_DIR",
            )
        _create(connection)
        return
    revision = str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())
    if revision > SCHEMA_REVISION:
        raise HostError(
            f"the database was written by a newer Atelier (form {revision}, this one knows {SCHEMA_REVISION})",
            code="database_too_new",
            hint="install that version again, or restore a backup from before the upgrade",
        )
    if revision < SCHEMA_REVISION:
        migrate(connection)


def _create(connection: Connection) -> None:
    metadata.create_all(connection)
    connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (SCHEMA_REVISION,))


def migrate(connection: Connection) -> None:
    """Run all missing migrations inside the caller's transaction."""
    from pathlib import Path

    from alembic import command
    from alembic.config import Config

    configuration = Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    configuration.attributes["connection"] = connection
    command.upgrade(configuration, "head")
