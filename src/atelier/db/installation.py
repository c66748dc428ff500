"""What an installation knows of itself: its id and its host's id. Written once, read by the manager at each start.

Settings that people choose are ``config``'s, not these.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert

from atelier.db.engine import Database
from atelier.db.tables import settings
from atelier.model.ids import new_installation_id, new_sandbox_id

_INSTALLATION_ID = "installation_id"
_HOST_ID = "host_id"
_PREVIEW_KEY = "preview_key"


@dataclass(frozen=True, slots=True)
class Installation:
    """``installation_id``: 4 characters, part of the name of every host resource; ``host_id``: 12 characters."""

    installation_id: str
    host_id: str


async def load_installation(database: Database) -> Installation:
    """The ids of this data folder, made at the first start."""

    def load(connection: Connection) -> Installation:
        installation_id = _ensure(connection, _INSTALLATION_ID, new_installation_id())
        return Installation(installation_id, _ensure(connection, _HOST_ID, new_sandbox_id()))

    return await database.write(load)


async def load_preview_key(database: Database) -> bytes:
    """By which links to previews, and their cookies, are signed; made at the first start."""
    return bytes.fromhex(
        await database.write(lambda connection: _ensure(connection, _PREVIEW_KEY, secrets.token_hex(32)))
    )


def _find(connection: Connection, name: str) -> str | None:
    return connection.execute(select(settings.c.value).where(settings.c.name == name)).scalar_one_or_none()


def _ensure(connection: Connection, name: str, value: str) -> str:
    connection.execute(insert(settings).values(name=name, value=value).on_conflict_do_nothing())
    stored = _find(connection, name)
    assert stored is not None
    return stored
