"""Alembic's entry: runs migrations on the connection, and inside the transaction, that ``db.schema`` hands over."""

from __future__ import annotations

from typing import cast

from alembic import context
from sqlalchemy import Connection

from atelier.db.tables import metadata

connection = cast(Connection, context.config.attributes["connection"])
# SQLite's DDL is transactional, and the transaction is ours: a migration that fails half-way leaves the file as it was.
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True, render_as_batch=True)
context.run_migrations()
