"""The table of snapshots. Called by ``lifecycle`` (writes) and ``services`` (queries)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from atelier.db.pages import bearing, make_cursor, parse_cursor
from atelier.db.sandbox_access import visible_to
from atelier.db.tables import sandboxes, snapshots
from atelier.model.errors import ConflictError, NotFoundError
from atelier.model.ids import is_sandbox_id
from atelier.model.saved_machine import MachineRecord
from atelier.model.snapshot import Snapshot, SnapshotPurpose, SnapshotState

_INSERT = insert(snapshots)
_ROW = select(snapshots)
_UPDATE = update(snapshots).where(snapshots.c.id == bindparam("snapshot_id"))


class SnapshotRepository:
    """Stateless: everything stands in the table. All methods work in the caller's transaction."""

    def insert(self, connection: Connection, snapshot: Snapshot) -> None:
        """Raises ConflictError (``name_taken``)."""
        try:
            connection.execute(_INSERT, _to_values(snapshot))
        except IntegrityError as error:
            if "snapshots.name" not in str(error.orig):
                raise
            raise ConflictError(
                f"there is a snapshot named {snapshot.name} already",
                code="name_taken",
                hint="choose another name, leave it out to have one generated, or delete the other snapshot",
            ) from error

    def find(self, connection: Connection, id_or_name: str) -> Snapshot | None:
        column = snapshots.c.id if is_sandbox_id(id_or_name) else snapshots.c.name
        row = connection.execute(_ROW.where(column == id_or_name)).one_or_none()
        return None if row is None else _to_snapshot(row)

    def get(self, connection: Connection, id_or_name: str) -> Snapshot:
        """Raises NotFoundError (``snapshot_not_found``)."""
        snapshot = self.find(connection, id_or_name)
        if snapshot is None:
            raise NotFoundError(
                f"there is no snapshot {id_or_name!r}",
                code="snapshot_not_found",
                hint="atelier snapshots shows the ones there are",
            )
        return snapshot

    def list_page(
        self,
        connection: Connection,
        limit: int,
        cursor: str | None = None,
        *,
        states: Collection[SnapshotState],
        purposes: Collection[SnapshotPurpose],
        sandbox: str | None = None,
        labels: Mapping[str, str] | None = None,
        viewer_id: str | None = None,
    ) -> tuple[list[Snapshot], str | None]:
        """A page, oldest first, of ``states`` and ``purposes``, taken of ``sandbox`` (its id or name then) and bearing all
        ``labels``; ``viewer_id``: only those of this user, and of sandboxes shared with them; and the cursor of the next page, None after the last. A cursor stays good while snapshots come and go.

        Raises InvalidRequestError (``invalid_cursor``).
        """
        query = _in(states, purposes).limit(limit + 1)
        if cursor is not None:
            query = query.where(snapshots.c.sequence > parse_cursor(cursor))
        if viewer_id is not None:
            query = query.where(visible_to(viewer_id, snapshots.c.owner_id, snapshots.c.sandbox_id))
        if sandbox is not None:
            query = query.where(or_(snapshots.c.sandbox_id == sandbox, snapshots.c.sandbox_name == sandbox))
        rows = connection.execute(query.where(*bearing(snapshots.c.labels, labels or {}))).all()
        next_cursor = make_cursor(rows[limit - 1].sequence) if len(rows) > limit else None
        return [_to_snapshot(row) for row in rows[:limit]], next_cursor

    def list_in(
        self,
        connection: Connection,
        states: Collection[SnapshotState] = (),
        purposes: Collection[SnapshotPurpose] = (),
    ) -> list[Snapshot]:
        """Oldest first; of the given states and purposes, or all."""
        return [_to_snapshot(row) for row in connection.execute(_in(states, purposes))]

    def list_ids(self, connection: Connection) -> list[str]:
        return list(connection.execute(select(snapshots.c.id).order_by(snapshots.c.sequence)).scalars())

    def find_template(self, connection: Connection, key: str) -> Snapshot | None:
        """The newest that is ready."""
        query = _ROW.where(snapshots.c.template_key == key, snapshots.c.state == SnapshotState.READY.value)
        row = connection.execute(query.order_by(snapshots.c.sequence.desc()).limit(1)).one_or_none()
        return None if row is None else _to_snapshot(row)

    def list_dependants(self, connection: Connection, snapshot_id: str) -> tuple[list[str], list[str]]:
        """Names of the sandboxes whose disks stand over this snapshot's, and of the snapshots whose disks do."""
        own = select(sandboxes.c.name).where(sandboxes.c.snapshot_id == snapshot_id, sandboxes.c.holds_volume)
        children = select(snapshots.c.name).where(snapshots.c.base_id == snapshot_id)
        return sorted(connection.execute(own).scalars()), sorted(connection.execute(children).scalars())

    def list_unneeded_forks(self, connection: Connection) -> list[Snapshot]:
        """Those made for forks of which no sandbox has a row any more, and over which no snapshot's disk stands."""
        over_it = select(sandboxes.c.id).where(sandboxes.c.snapshot_id == snapshots.c.id)
        child = snapshots.alias()
        below = select(child.c.id).where(child.c.base_id == snapshots.c.id)
        query = _ROW.where(snapshots.c.purpose == SnapshotPurpose.FORK.value, ~over_it.exists(), ~below.exists())
        return [_to_snapshot(row) for row in connection.execute(query.order_by(snapshots.c.sequence))]

    def update(self, connection: Connection, snapshot: Snapshot) -> None:
        """Write all that may change: state, figures, checksums, trouble."""
        values = _to_values(snapshot)
        changing = ("state", "updated_at", "checksums", "boot_id", "memory_bytes", "disk_bytes", "stopped_ms")
        failure = ("failure_code", "failure_message", "failure_hint")
        connection.execute(
            _UPDATE, {"snapshot_id": snapshot.id, **{name: values[name] for name in (*changing, *failure)}}
        )

    def delete(self, connection: Connection, snapshot_id: str) -> None:
        """Its children in the tree become its parent's."""
        parent = select(snapshots.c.parent_id).where(snapshots.c.id == snapshot_id)
        parent_id = connection.execute(parent).scalar_one_or_none()
        connection.execute(update(snapshots).where(snapshots.c.parent_id == snapshot_id).values(parent_id=parent_id))
        connection.execute(delete(snapshots).where(snapshots.c.id == snapshot_id))


def _in(states: Collection[SnapshotState], purposes: Collection[SnapshotPurpose]) -> Select[Any]:
    query = _ROW.order_by(snapshots.c.sequence)
    if states:
        query = query.where(snapshots.c.state.in_([state.value for state in states]))
    if purposes:
        query = query.where(snapshots.c.purpose.in_([purpose.value for purpose in purposes]))
    return query


def _to_values(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "host_id": snapshot.host_id,
        "state": snapshot.state.value,
        "purpose": snapshot.purpose.value,
        "sandbox_id": snapshot.sandbox_id,
        "sandbox_name": snapshot.sandbox_name,
        "parent_id": snapshot.parent_id,
        "base_id": snapshot.base_id,
        "keep_last": snapshot.keep_last,
        "image": snapshot.image,
        "image_id": snapshot.image_id,
        "vcpu_count": snapshot.vcpu_count,
        "memory_mib": snapshot.memory_mib,
        "disk_mib": snapshot.disk_mib,
        "file_system_mib": snapshot.file_system_mib,
        "environment": snapshot.environment,
        "labels": snapshot.labels,
        "machine": snapshot.machine.to_json(),
        "checksums": snapshot.checksums,
        "boot_id": snapshot.boot_id,
        "memory_bytes": snapshot.memory_bytes,
        "disk_bytes": snapshot.disk_bytes,
        "stopped_ms": snapshot.stopped_ms,
        "template_key": snapshot.template_key,
        "owner_id": snapshot.owner_id,
        "failure_code": snapshot.failure_code,
        "failure_message": snapshot.failure_message,
        "failure_hint": snapshot.failure_hint,
        "created_at": snapshot.created_at,
        "updated_at": snapshot.updated_at,
    }


def _to_snapshot(row: Row[Any]) -> Snapshot:
    return Snapshot(
        id=row.id,
        name=row.name,
        host_id=row.host_id,
        state=SnapshotState(row.state),
        purpose=SnapshotPurpose(row.purpose),
        sandbox_id=row.sandbox_id,
        sandbox_name=row.sandbox_name,
        parent_id=row.parent_id,
        base_id=row.base_id,
        keep_last=row.keep_last,
        image=row.image,
        image_id=row.image_id,
        vcpu_count=row.vcpu_count,
        memory_mib=row.memory_mib,
        disk_mib=row.disk_mib,
        file_system_mib=row.file_system_mib,
        environment=row.environment,
        labels=row.labels,
        machine=MachineRecord.from_json(row.machine),
        checksums=row.checksums,
        boot_id=row.boot_id,
        memory_bytes=row.memory_bytes,
        disk_bytes=row.disk_bytes,
        stopped_ms=row.stopped_ms,
        template_key=row.template_key,
        owner_id=row.owner_id,
        failure_code=row.failure_code,
        failure_message=row.failure_message,
        failure_hint=row.failure_hint,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
