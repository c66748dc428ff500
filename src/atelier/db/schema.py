"""Making the tables in a new file, and bringing an older file's to this version's form.

Called by ``engine``, after ``examination`` has found out which form a file has. Importing Alembic costs time and memory,
so it is loaded only for a file of an older version; a new file is made from ``tables`` at once (a test proves that both
ways end in the same tables).
"""

from __future__ import annotations

from sqlalchemy import Connection

from atelier.db.tables import SCHEMA_REVISION, metadata


def create(connection: Connection) -> None:
    """Make all tables inside the caller's transaction."""
    metadata.create_all(connection)
    connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (SCHEMA_REVISION,))


def migrate(connection: Connection, revision: str = "head") -> None:
    """Run the missing migrations up to ``revision`` inside the caller's transaction."""
    from pathlib import Path

    from alembic import command
    from alembic.config import Config

    configuration = Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    configuration.attributes["connection"] = connection
    command.upgrade(configuration, revision)
