"""The audit log, and the keys by which requests are told to be the same. Called by ``services``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from atelier.db.tables import audit_entries, idempotency_keys
from atelier.model.principal import AuditEntry


class AuditRepository:
    """Stateless: everything stands in the table. All methods work in the caller's transaction."""

    def append(self, connection: Connection, entries: Sequence[AuditEntry]) -> None:
        """Their ids are given here."""
        rows = [{name: value for name, value in asdict(each).items() if name != "id"} for each in entries]
        connection.execute(insert(audit_entries), rows)

    def list_page(
        self, connection: Connection, limit: int, before: int | None, user_id: str, operation: str
    ) -> list[AuditEntry]:
        """Newest first, with ids below ``before``; empty ``user_id`` and ``operation``: all."""
        query = select(audit_entries).order_by(audit_entries.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit_entries.c.id < before)
        if user_id:
            query = query.where(audit_entries.c.user_id == user_id)
        if operation:
            query = query.where(audit_entries.c.operation == operation)
        return [AuditEntry(*row) for row in connection.execute(query)]

    def trim(self, connection: Connection, before: datetime) -> None:
        connection.execute(delete(audit_entries).where(audit_entries.c.at < before))


@dataclass(frozen=True, slots=True)
class RememberedRequest:
    """``made``: ids of what it made; None: nobody has said how it ended."""

    request_hash: str
    made: list[str] | None


class IdempotencyRepository:
    """Stateless: everything stands in the table. All methods work in the caller's transaction."""

    def find(self, connection: Connection, user_id: str, key: str) -> RememberedRequest | None:
        query = select(idempotency_keys.c.request_hash, idempotency_keys.c.made)
        row = connection.execute(query.where(*_is(user_id, key))).one_or_none()
        return None if row is None else RememberedRequest(row.request_hash, row.made)

    def insert(self, connection: Connection, user_id: str, key: str, request_hash: str, at: datetime) -> None:
        values = {"user_id": user_id, "key": key, "request_hash": request_hash, "made": None, "created_at": at}
        connection.execute(insert(idempotency_keys), values)

    def set_made(self, connection: Connection, user_id: str, key: str, made: list[str]) -> None:
        connection.execute(update(idempotency_keys).where(*_is(user_id, key)).values(made=made))

    def delete(self, connection: Connection, user_id: str, key: str) -> None:
        connection.execute(delete(idempotency_keys).where(*_is(user_id, key)))

    def trim(self, connection: Connection, before: datetime) -> None:
        connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at < before))


def _is(user_id: str, key: str) -> tuple[ColumnElement[bool], ...]:
    return idempotency_keys.c.user_id == user_id, idempotency_keys.c.key == key
