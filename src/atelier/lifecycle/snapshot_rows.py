"""The one place that changes a snapshot's row: state and event in one transaction. Used by the snapshots' sagas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from atelier.db.engine import Connection, signal
from atelier.db.outbox import Outbox
from atelier.db.snapshots import SnapshotRepository
from atelier.lifecycle.transitions import Failure
from atelier.model.snapshot import Snapshot, SnapshotState

STATE_CHANGED = "snapshot.state_changed"
DELETED = "snapshot.deleted"


def snapshot_topic(snapshot_id: str) -> str:
    """What to subscribe to in order to wake whenever this snapshot's row changes or goes."""
    return f"snapshot/{snapshot_id}"


class SnapshotRows:
    """``now`` is the clock of ``updated_at``."""

    def __init__(self, repository: SnapshotRepository, outbox: Outbox, now: Callable[[], datetime]) -> None:
        self.repository = repository
        self._outbox = outbox
        self._now = now

    def begin(self, connection: Connection, snapshot: Snapshot) -> None:
        """Raises ConflictError (``name_taken``)."""
        self.repository.insert(connection, snapshot)
        self._tell(connection, snapshot)

    def move(self, connection: Connection, snapshot_id: str, state: SnapshotState, **changes: Any) -> Snapshot:
        """To ``state``, with whatever else the row then says. Raises NotFoundError."""
        present = self.repository.get(connection, snapshot_id)
        changed = replace(present, state=state, updated_at=self._now(), **changes)
        self.repository.update(connection, changed)
        self._tell(connection, changed)
        return changed

    def fail(
        self, connection: Connection, snapshot_id: str, failure: Failure, state: SnapshotState = SnapshotState.FAILED
    ) -> None:
        """To ``state``, with the reason. Nothing where the row is gone: it was deleted while something was stuck."""
        if self.repository.find(connection, snapshot_id) is None:
            return
        self.move(
            connection,
            snapshot_id,
            state,
            failure_code=failure.code,
            failure_message=failure.message,
            failure_hint=failure.hint,
        )

    def end(self, connection: Connection, snapshot_id: str) -> None:
        """Remove the row: nothing of the snapshot is left."""
        snapshot = self.repository.get(connection, snapshot_id)
        # While the row still says whose it is, which decides who reads of it.
        self._outbox.append(connection, DELETED, snapshot.sandbox_id, {"id": snapshot_id, "name": snapshot.name})
        self.repository.delete(connection, snapshot_id)
        signal(connection, snapshot_topic(snapshot_id))

    def _tell(self, connection: Connection, snapshot: Snapshot) -> None:
        payload: dict[str, Any] = {"id": snapshot.id, "name": snapshot.name, "state": snapshot.state.value}
        if snapshot.failure_code:
            payload["failure"] = {
                "code": snapshot.failure_code,
                "message": snapshot.failure_message,
                "hint": snapshot.failure_hint,
            }
        self._outbox.append(connection, STATE_CHANGED, snapshot.sandbox_id, payload)
        signal(connection, snapshot_topic(snapshot.id))
