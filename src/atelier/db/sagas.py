"""The durable saga log: ``saga.log.SagaLog`` over the table of sagas. Made by ``manager.wiring``.

The executor alone changes records; queries by subject serve ``lifecycle`` and doctor.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from atelier.db.engine import Database
from atelier.db.tables import sagas
from atelier.saga.log import OPEN_STATUSES, Change, Hook, SagaGoneError, SagaRecord, SagaStatus

# Built once: SQLAlchemy spends more time on building a statement than SQLite on running it.
_FIND = select(sagas).where(sagas.c.id == bindparam("saga_id"))
_OPEN = select(sagas).where(sagas.c.status.in_(OPEN_STATUSES)).order_by(sagas.c.sequence)
_INSERT = insert(sagas)
_UPDATE = update(sagas).where(sagas.c.id == bindparam("saga_id"))


class SagaStore:
    """Satisfies ``SagaLog[Connection]``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def insert(self, transaction: Connection, record: SagaRecord) -> None:
        now = datetime.now(UTC)
        values = {
            "id": record.id,
            "kind": record.kind,
            "subject_id": record.subject_id,
            "inputs": record.inputs,
            "created_at": now,
        }
        transaction.execute(_INSERT, {**values, **_changing_values(record, now)})

    def find(self, saga_id: str) -> SagaRecord | None:
        with self._database.read() as connection:
            return _find(connection, saga_id)

    def list_open(self) -> list[SagaRecord]:
        with self._database.read() as connection:
            return [_to_record(row) for row in connection.execute(_OPEN)]

    def list_younger(self, record: SagaRecord) -> list[SagaRecord]:
        own = select(sagas.c.sequence).where(sagas.c.id == record.id).scalar_subquery()
        query = _OPEN.where(sagas.c.subject_id == record.subject_id, sagas.c.sequence > own)
        with self._database.read() as connection:
            return [_to_record(row) for row in connection.execute(query)]

    def update_open(self, transaction: Connection, subject_id: str, change: Change) -> list[SagaRecord]:
        changed: list[SagaRecord] = []
        for stored in list_open_sagas_of(transaction, subject_id):
            changed.append(change(stored))
            transaction.execute(_UPDATE, {"saga_id": stored.id, **_changing_values(changed[-1], datetime.now(UTC))})
        return changed

    async def update(self, saga_id: str, change: Change, also: Hook[Connection] | None = None) -> SagaRecord:
        def apply(connection: Connection) -> SagaRecord:
            stored = _find(connection, saga_id)
            if stored is None:
                raise SagaGoneError(saga_id)
            record = change(stored)
            if record != stored:
                connection.execute(_UPDATE, {"saga_id": saga_id, **_changing_values(record, datetime.now(UTC))})
            if also is not None:
                also(connection, record)
            return record

        return await self._database.write(apply)


def list_open_sagas_of(connection: Connection, subject_id: str) -> list[SagaRecord]:
    """What is under way with a subject, or stuck; oldest first."""
    return [_to_record(row) for row in connection.execute(_OPEN.where(sagas.c.subject_id == subject_id))]


def delete_saga(connection: Connection, saga_id: str) -> None:
    connection.execute(delete(sagas).where(sagas.c.id == saga_id))


def delete_sagas_of(connection: Connection, subject_id: str) -> None:
    connection.execute(delete(sagas).where(sagas.c.subject_id == subject_id))


def _find(connection: Connection, saga_id: str) -> SagaRecord | None:
    row = connection.execute(_FIND, {"saga_id": saga_id}).one_or_none()
    return None if row is None else _to_record(row)


def _changing_values(record: SagaRecord, now: datetime) -> dict[str, Any]:
    return {
        "status": record.status.value,
        "step": record.step,
        "unwind_requested": record.unwind_requested,
        "outputs": record.outputs,
        "failure": record.failure,
        "error": record.error,
        "recoveries": record.recoveries,
        "updated_at": now,
    }


def _to_record(row: Row[Any]) -> SagaRecord:
    return SagaRecord(
        id=row.id,
        kind=row.kind,
        subject_id=row.subject_id,
        step=row.step,
        status=SagaStatus(row.status),
        unwind_requested=row.unwind_requested,
        inputs=row.inputs,
        outputs=row.outputs,
        failure=row.failure,
        error=row.error,
        recoveries=row.recoveries,
    )
