"""The first-run link: a hash of its secret and when it ends, or that it was used. Called by ``services``."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert

from atelier.db.tables import settings

_NAME = "first_run_link"
_USED = "used"


class FirstRunRepository:
    """Stateless: everything stands in the table. All methods work in the caller's transaction."""

    def find(self, connection: Connection) -> tuple[str, datetime] | None:
        """(hash, end) of the link that there is; None when there is none, or it was used."""
        value = self._read(connection)
        if value is None or value == _USED:
            return None
        link_hash, _, end = value.partition(" ")
        return link_hash, datetime.fromisoformat(end)

    def was_used(self, connection: Connection) -> bool:
        return self._read(connection) == _USED

    def put(self, connection: Connection, link_hash: str, end: datetime) -> None:
        self._write(connection, f"{link_hash} {end.isoformat()}")

    def set_used(self, connection: Connection) -> None:
        self._write(connection, _USED)

    def _read(self, connection: Connection) -> str | None:
        return connection.execute(select(settings.c.value).where(settings.c.name == _NAME)).scalar_one_or_none()

    def _write(self, connection: Connection, value: str) -> None:
        statement = insert(settings).values(name=_NAME, value=value)
        connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"value": value}))
