"""The table of the public keys by which users come over SSH. Called by ``services``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select
from sqlalchemy.exc import IntegrityError

from atelier.db.tables import ssh_keys, users
from atelier.model.errors import ConflictError
from atelier.model.principal import ALL_SCOPES, Principal, Role
from atelier.model.ssh_key import PublicKey, SshKey


class SshKeyRepository:
    """Stateless: everything stands in the tables. All methods work in the caller's transaction."""

    def insert(self, connection: Connection, key: SshKey) -> None:
        """Raises ConflictError (``ssh_key_exists``)."""
        values = {
            "id": key.id,
            "user_id": key.user_id,
            "name": key.name,
            "type": key.key.type,
            "blob": key.key.blob,
            "comment": key.key.comment,
            "created_at": key.created_at,
        }
        try:
            connection.execute(insert(ssh_keys), values)
        except IntegrityError as error:
            raise ConflictError(
                "this key is registered already", code="ssh_key_exists", hint="atelier ssh-key ls shows your keys"
            ) from error

    def list_of(self, connection: Connection, user_id: str | None) -> list[SshKey]:
        """Oldest first; ``user_id`` None: everybody's."""
        query = select(ssh_keys).order_by(ssh_keys.c.created_at, ssh_keys.c.id)
        if user_id is not None:
            query = query.where(ssh_keys.c.user_id == user_id)
        return [_to_key(row) for row in connection.execute(query)]

    def find(self, connection: Connection, key_id: str) -> SshKey | None:
        row = connection.execute(select(ssh_keys).where(ssh_keys.c.id == key_id)).one_or_none()
        return None if row is None else _to_key(row)

    def delete(self, connection: Connection, key_id: str) -> None:
        connection.execute(delete(ssh_keys).where(ssh_keys.c.id == key_id))

    def list_holders(self, connection: Connection, blob: str) -> list[tuple[Principal, str]]:
        """Who has registered the key and is not disabled, with the key's id: two people may share one."""
        query = (
            select(ssh_keys.c.id, users.c.id.label("user_id"), users.c.name, users.c.role)
            .join(users, users.c.id == ssh_keys.c.user_id)
            .where(ssh_keys.c.blob == blob, ~users.c.is_disabled)
            .order_by(ssh_keys.c.created_at, ssh_keys.c.id)
        )
        return [
            (Principal(row.user_id, row.name, Role(row.role), ALL_SCOPES), row.id) for row in connection.execute(query)
        ]


def _to_key(row: Row[Any]) -> SshKey:
    return SshKey(row.id, row.user_id, row.name, PublicKey(row.type, row.blob, row.comment), row.created_at)
