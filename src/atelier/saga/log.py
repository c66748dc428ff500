"""What is remembered of a saga, and what a store of such records must promise.

The executor decides how a record changes; a store only keeps it, durably and atomically with what hooks write into the
same transaction. ``db/sagas.py`` is the real store; ``MemorySagaLog`` serves unit tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeVar


class SagaStatus(StrEnum):
    """``running`` and ``unwinding`` are under way; the ``stuck_`` ones wait for a person, a restart or a requested
    unwinding; ``completed`` and ``unwound`` have ended, and a requested unwinding opens them again."""

    RUNNING = "running"
    UNWINDING = "unwinding"
    STUCK_RUNNING = "stuck_running"
    STUCK_UNWINDING = "stuck_unwinding"
    COMPLETED = "completed"
    UNWOUND = "unwound"


OPEN_STATUSES = frozenset(
    {SagaStatus.RUNNING, SagaStatus.UNWINDING, SagaStatus.STUCK_RUNNING, SagaStatus.STUCK_UNWINDING}
)
STUCK_STATUSES = frozenset({SagaStatus.STUCK_RUNNING, SagaStatus.STUCK_UNWINDING})


@dataclass(frozen=True, slots=True)
class SagaRecord:
    """One saga. ``step`` is the furthest step that may have begun; unwinding starts from it, however often.
    ``recoveries`` counts the starts of the process that resumed it.

    ``failure`` is why it unwinds by itself (empty if it was asked to), ``error`` why it is stuck. Both, ``inputs`` and
    ``outputs`` hold JSON. ``unwind_requested`` never goes back to False.
    """

    id: str
    kind: str
    subject_id: str
    step: str
    status: SagaStatus = SagaStatus.RUNNING
    unwind_requested: bool = False
    inputs: dict[str, Any] = field(default_factory=dict[str, Any])
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    failure: dict[str, Any] = field(default_factory=dict[str, Any])
    error: dict[str, Any] = field(default_factory=dict[str, Any])
    recoveries: int = 0

    @property
    def is_open(self) -> bool:
        return self.status in OPEN_STATUSES

    @property
    def is_stuck(self) -> bool:
        return self.status in STUCK_STATUSES


class SagaGoneError(Exception):
    """There is no record of this id (any more)."""


TransactionT = TypeVar("TransactionT")
"""The log's open transaction. The engine only hands it on to hooks."""

Change = Callable[[SagaRecord], SagaRecord]
Hook = Callable[[TransactionT, SagaRecord], None]


class SagaLog(Protocol[TransactionT]):
    """A durable set of records."""

    def insert(self, transaction: TransactionT, record: SagaRecord) -> None:
        """Add a record as part of a transaction that the caller commits."""
        ...

    def find(self, saga_id: str) -> SagaRecord | None:
        """The committed record."""
        ...

    def list_open(self) -> list[SagaRecord]:
        """All records of an open status, oldest first."""
        ...

    def list_younger(self, record: SagaRecord) -> list[SagaRecord]:
        """The open records of the same subject that were inserted after this one, oldest first."""
        ...

    def update_open(self, transaction: TransactionT, subject_id: str, change: Change) -> list[SagaRecord]:
        """Change all open records of a subject as part of a transaction that the caller commits; returns them."""
        ...

    async def update(self, saga_id: str, change: Change, also: Hook[TransactionT] | None = None) -> SagaRecord:
        """In one durable transaction: read the record, store what ``change`` makes of it, then call ``also`` with the
        transaction and the new record. Returns the new record once it is on disk.

        Raises SagaGoneError; any error of ``change`` or ``also`` rolls back and is raised.
        """
        ...


class MemorySagaLog:
    """A log without a disk, for unit tests. Its transaction is the log itself. ``writes`` counts updates."""

    def __init__(self) -> None:
        self.records: dict[str, SagaRecord] = {}
        self.writes = 0

    def insert(self, transaction: MemorySagaLog, record: SagaRecord) -> None:
        transaction.records[record.id] = record

    def find(self, saga_id: str) -> SagaRecord | None:
        return self.records.get(saga_id)

    def list_open(self) -> list[SagaRecord]:
        return [record for record in self.records.values() if record.is_open]

    def list_younger(self, record: SagaRecord) -> list[SagaRecord]:
        ids = list(self.records)
        younger = ids[ids.index(record.id) + 1 :] if record.id in self.records else []
        return [each for each in self.list_open() if each.id in younger and each.subject_id == record.subject_id]

    def update_open(self, transaction: MemorySagaLog, subject_id: str, change: Change) -> list[SagaRecord]:
        changed = [change(each) for each in transaction.list_open() if each.subject_id == subject_id]
        transaction.records.update({each.id: each for each in changed})
        return changed

    async def update(self, saga_id: str, change: Change, also: Hook[MemorySagaLog] | None = None) -> SagaRecord:
        before = dict(self.records)
        if saga_id not in before:
            raise SagaGoneError(saga_id)
        self.writes += 1
        record = change(before[saga_id])
        self.records[saga_id] = record
        if also is not None:
            try:
                also(self, record)
            except BaseException:
                self.records = before
                raise
        return record
