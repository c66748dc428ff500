"""The table of sandboxes. Called by ``lifecycle`` (writes) and ``services`` (queries).

The state column is written by ``lifecycle/transitions.py`` alone, through ``set_state``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from atelier.db.pages import bearing, make_cursor, parse_cursor
from atelier.db.sandbox_access import visible_to
from atelier.db.tables import sandboxes
from atelier.model.errors import CapacityError, ConflictError, NotFoundError
from atelier.model.ids import is_sandbox_id
from atelier.model.machine import ProcessIdentity
from atelier.model.sandbox import Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.states import SandboxState, StopReason


@dataclass(frozen=True, slots=True)
class GuestSecrets:
    """What a sandbox keeps for itself and no API shows: the guest channel's token (32 hex digits or more) and the
    guest's machine-id (32 hex digits)."""

    token: str
    machine_id: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What the sandboxes of a host have been promised."""

    vcpu_count: int
    memory_mib: int
    disk_mib: int
    slots: int


# Built once: SQLAlchemy spends more time on building a statement than SQLite on running it.
_INSERT = insert(sandboxes)
# Without what may be long and few ask for: ``sandbox_networks`` and ``sandbox_machines`` read it.
_ROW = select(*(each for each in sandboxes.c if each.name not in ("network_policy", "machine", "saved_memory")))
_FIND_BY_ID = _ROW.where(sandboxes.c.id == bindparam("reference"))
_FIND_BY_NAME = _ROW.where(sandboxes.c.name == bindparam("reference"))
_UPDATE = update(sandboxes).where(sandboxes.c.id == bindparam("sandbox_id"))

_WITHOUT_VMM = (SandboxState.STOPPED, SandboxState.PAUSED, SandboxState.FAILED)


class SandboxRepository:
    """Stateless: everything stands in the table. All methods work in the caller's transaction."""

    def insert(self, connection: Connection, sandbox: Sandbox, secrets: GuestSecrets) -> None:
        """Raises ConflictError (``name_taken``)."""
        spec = sandbox.spec
        try:
            connection.execute(
                _INSERT,
                {
                    "id": sandbox.id,
                    "name": sandbox.name,
                    "host_id": sandbox.host_id,
                    "state": sandbox.state.value,
                    "image": spec.image,
                    "image_id": spec.image_id,
                    "vcpu_count": spec.vcpu_count,
                    "memory_mib": spec.memory_mib,
                    "disk_mib": spec.disk_mib,
                    "environment": spec.environment,
                    "labels": spec.labels,
                    "guest_token": secrets.token,
                    "machine_id": secrets.machine_id,
                    "holds_volume": sandbox.holds_volume,
                    "stop_reason": sandbox.stop_reason or "",
                    "file_system_mib": sandbox.file_system_mib,
                    "auto_stop_after_idle_seconds": spec.auto_stop_after_idle_seconds,
                    "expires_at": spec.expires_at,
                    "last_active_at": sandbox.last_active_at,
                    "owner_id": spec.owner_id,
                    "snapshot_id": sandbox.snapshot_id,
                    "disk_only": sandbox.disk_only,
                    "purpose": sandbox.purpose.value,
                    "failure_code": sandbox.failure_code,
                    "failure_message": sandbox.failure_message,
                    "failure_hint": sandbox.failure_hint,
                    "console_tail": sandbox.console_tail,
                    "created_at": sandbox.created_at,
                    "updated_at": sandbox.updated_at,
                },
            )
        except IntegrityError as error:
            raise _as_conflict(error, sandbox.name) from error

    def find(self, connection: Connection, id_or_name: str) -> Sandbox | None:
        query = _FIND_BY_ID if is_sandbox_id(id_or_name) else _FIND_BY_NAME
        row = connection.execute(query, {"reference": id_or_name}).one_or_none()
        return None if row is None else _to_sandbox(row)

    def get(self, connection: Connection, id_or_name: str) -> Sandbox:
        """Raises NotFoundError (``sandbox_not_found``)."""
        sandbox = self.find(connection, id_or_name)
        if sandbox is None:
            raise NotFoundError(
                f"there is no sandbox {id_or_name!r}",
                code="sandbox_not_found",
                hint="atelier ls shows the ones there are",
            )
        return sandbox

    def list_page(
        self,
        connection: Connection,
        limit: int,
        cursor: str | None = None,
        state: SandboxState | None = None,
        labels: Mapping[str, str] | None = None,
        viewer_id: str | None = None,
    ) -> tuple[list[Sandbox], str | None]:
        """A page, newest first, of the users' own in ``state`` that bear all ``labels``; and the cursor of the next page, None
        after the last. ``viewer_id``: only those of this user, and those shared with them. A cursor stays good while sandboxes come and go: none is shown twice, none that stays is left
        out.

        Raises InvalidRequestError (``invalid_cursor``).
        """
        query = _ROW.order_by(sandboxes.c.sequence.desc()).limit(limit + 1)
        query = query.where(sandboxes.c.purpose == SandboxPurpose.USER.value)
        if viewer_id is not None:
            query = query.where(visible_to(viewer_id, sandboxes.c.owner_id, sandboxes.c.id))
        if cursor is not None:
            query = query.where(sandboxes.c.sequence < parse_cursor(cursor))
        if state is not None:
            query = query.where(sandboxes.c.state == state.value)
        query = query.where(*bearing(sandboxes.c.labels, labels or {}))
        rows = connection.execute(query).all()
        next_cursor = make_cursor(rows[limit - 1].sequence) if len(rows) > limit else None
        return [_to_sandbox(row) for row in rows[:limit]], next_cursor

    def list_in(self, connection: Connection, states: Collection[SandboxState] = ()) -> list[Sandbox]:
        """Oldest first; of the given states, or all. One query: loops of the manager ask this every few seconds."""
        query = _ROW.order_by(sandboxes.c.sequence)
        if states:
            query = query.where(sandboxes.c.state.in_([state.value for state in states]))
        return [_to_sandbox(row) for row in connection.execute(query)]

    def list_ids(self, connection: Connection, states: Collection[SandboxState] = ()) -> list[str]:
        """Ids, oldest first; of the given states, or all."""
        query = select(sandboxes.c.id).order_by(sandboxes.c.sequence)
        if states:
            query = query.where(sandboxes.c.state.in_([state.value for state in states]))
        return list(connection.execute(query).scalars())

    def count_by_state(self, connection: Connection) -> dict[SandboxState, int]:
        """Only states that occur."""
        query = select(sandboxes.c.state, func.count()).group_by(sandboxes.c.state)
        return {SandboxState(state): count for state, count in connection.execute(query)}

    def sum_usage(self, connection: Connection, host_id: str, *, without: SandboxPurpose | None = None) -> Usage:
        """vCPUs and memory of all sandboxes that have, or are about to have, a VMM; volumes at their full sizes; a slot
        for each that has a volume, since it is kept as long. ``without``: those of this purpose aside."""
        counted = [sandboxes.c.host_id == host_id]
        if without is not None:
            counted.append(sandboxes.c.purpose != without.value)
        vmms = connection.execute(
            select(
                func.coalesce(func.sum(sandboxes.c.vcpu_count), 0), func.coalesce(func.sum(sandboxes.c.memory_mib), 0)
            ).where(*counted, sandboxes.c.state.not_in([state.value for state in _WITHOUT_VMM]))
        ).one()
        held = connection.execute(
            select(func.coalesce(func.sum(sandboxes.c.disk_mib), 0), func.count()).where(
                *counted, sandboxes.c.holds_volume
            )
        ).one()
        return Usage(vcpu_count=vmms[0], memory_mib=vmms[1], disk_mib=held[0], slots=held[1])

    def set_state(
        self,
        connection: Connection,
        sandbox_id: str,
        state: SandboxState,
        updated_at: datetime,
        *,
        failure_code: str = "",
        failure_message: str = "",
        failure_hint: str = "",
        console_tail: str = "",
        stop_reason: StopReason | None = None,
    ) -> None:
        connection.execute(
            _UPDATE,
            {
                "sandbox_id": sandbox_id,
                "state": state.value,
                "updated_at": updated_at,
                "failure_code": failure_code,
                "failure_message": failure_message,
                "failure_hint": failure_hint,
                "console_tail": console_tail,
                "stop_reason": stop_reason or "",
            },
        )

    def find_pooled(
        self, connection: Connection, host_id: str, image: str, vcpu_count: int, memory_mib: int
    ) -> list[Sandbox]:
        """Those of a host that wait in this warm pool, or are about to, oldest first."""
        query = _ROW.where(
            sandboxes.c.purpose == SandboxPurpose.POOL.value,
            sandboxes.c.host_id == host_id,
            sandboxes.c.image == image,
            sandboxes.c.vcpu_count == vcpu_count,
            sandboxes.c.memory_mib == memory_mib,
        )
        return [_to_sandbox(row) for row in connection.execute(query.order_by(sandboxes.c.sequence))]

    def give_away(self, connection: Connection, sandbox_id: str, name: str, spec: SandboxSpec, at: datetime) -> None:
        """A pooled sandbox becomes a user's, as though it had been made for that just now, and so the newest. Raises
        ConflictError (``name_taken``)."""
        newest = connection.execute(select(func.max(sandboxes.c.sequence))).scalar_one()
        values = {
            "sequence": newest + 1,
            "name": name,
            "purpose": SandboxPurpose.USER.value,
            "environment": spec.environment,
            "labels": spec.labels,
            "auto_stop_after_idle_seconds": spec.auto_stop_after_idle_seconds,
            "expires_at": spec.expires_at,
            "owner_id": spec.owner_id,
            "created_at": at,
        }
        try:
            connection.execute(_UPDATE, {"sandbox_id": sandbox_id, **values})
        except IntegrityError as error:
            raise _as_conflict(error, name) from error

    def set_image_id(self, connection: Connection, sandbox_id: str, image_id: str) -> None:
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "image_id": image_id})

    def find_origin(self, connection: Connection, sandbox_id: str) -> str | None:
        """Id of the snapshot that it was created from."""
        query = select(sandboxes.c.snapshot_id).where(sandboxes.c.id == sandbox_id)
        return connection.execute(query).scalar_one_or_none()

    def set_holds_volume(self, connection: Connection, sandbox_id: str, holds_volume: bool) -> None:
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "holds_volume": holds_volume})

    def set_disk_mib(self, connection: Connection, sandbox_id: str, disk_mib: int) -> None:
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "disk_mib": disk_mib})

    def set_file_system_mib(self, connection: Connection, sandbox_id: str, file_system_mib: int) -> None:
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "file_system_mib": file_system_mib})

    def set_time_limits(self, connection: Connection, sandbox_id: str, spec: SandboxSpec) -> None:
        """Both limits as ``spec`` has them."""
        limits = {
            "auto_stop_after_idle_seconds": spec.auto_stop_after_idle_seconds,
            "expires_at": spec.expires_at,
        }
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, **limits})

    def set_last_active_at(self, connection: Connection, sandbox_id: str, at: datetime) -> None:
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "last_active_at": at})

    def list_limited(self, connection: Connection) -> list[Sandbox]:
        """Those that have a time limit of either kind."""
        limited = sandboxes.c.expires_at.is_not(None) | sandboxes.c.auto_stop_after_idle_seconds.is_not(None)
        return [_to_sandbox(row) for row in connection.execute(_ROW.where(limited))]

    def set_vmm_process(self, connection: Connection, sandbox_id: str, identity: ProcessIdentity | None) -> None:
        values: dict[str, object] = {"vmm_pid": None, "vmm_start_time_ticks": None, "vmm_boot_id": None}
        if identity is not None:
            values = {
                "vmm_pid": identity.pid,
                "vmm_start_time_ticks": identity.start_time_ticks,
                "vmm_boot_id": identity.boot_id,
            }
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, **values})

    def find_vmm_process(self, connection: Connection, sandbox_id: str) -> ProcessIdentity | None:
        """The VMM that was started last, as far as the row knows; whether it lives is the VMM driver's to say."""
        columns = (sandboxes.c.vmm_pid, sandboxes.c.vmm_start_time_ticks, sandboxes.c.vmm_boot_id)
        row = connection.execute(select(*columns).where(sandboxes.c.id == sandbox_id)).one_or_none()
        return None if row is None or row[0] is None else ProcessIdentity(row[0], row[1], row[2])

    def take_lease(self, connection: Connection, sandbox_id: str, slot_count: int | None) -> int:
        """The sandbox's network lease: the one it has, else the lowest that is free on its host.

        Raises NotFoundError, CapacityError when all of ``slot_count`` are taken.
        """
        columns = (sandboxes.c.host_id, sandboxes.c.network_lease)
        row = connection.execute(select(*columns).where(sandboxes.c.id == sandbox_id)).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no sandbox {sandbox_id!r}", code="sandbox_not_found")
        if row.network_lease is not None:
            return int(row.network_lease)
        on_host = select(sandboxes.c.network_lease).where(sandboxes.c.host_id == row.host_id)
        taken = set(connection.execute(on_host).scalars())
        lease = next(number for number in range(len(taken) + 1) if number not in taken)
        if slot_count is not None and lease >= slot_count:
            raise CapacityError(
                f"all {slot_count} network slots of this host are taken",
                code="no_addresses_left",
                hint="remove sandboxes (atelier ls, atelier rm)",
            )
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "network_lease": lease})
        return lease

    def get_lease(self, connection: Connection, sandbox_id: str) -> int:
        """The lease that ``take_lease`` gave. Raises NotFoundError."""
        query = select(sandboxes.c.network_lease).where(sandboxes.c.id == sandbox_id)
        lease = connection.execute(query).scalar_one_or_none()
        if lease is None:
            raise NotFoundError(f"sandbox {sandbox_id!r} has no network lease", code="lease_not_found")
        return int(lease)

    def release_lease(self, connection: Connection, sandbox_id: str) -> None:
        """The addresses go with it."""
        nothing = {"network_lease": None, "network_address": None, "network_gateway": None}
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, **nothing})

    def list_vmm_processes(self, connection: Connection, host_id: str) -> list[ProcessIdentity]:
        """The VMMs of a host, as far as the rows know."""
        columns = (sandboxes.c.vmm_pid, sandboxes.c.vmm_start_time_ticks, sandboxes.c.vmm_boot_id)
        rows = connection.execute(
            select(*columns).where(sandboxes.c.host_id == host_id, sandboxes.c.vmm_pid.is_not(None))
        )
        return [ProcessIdentity(row[0], row[1], row[2]) for row in rows]

    def list_volume_holders(self, connection: Connection, host_id: str) -> list[str]:
        """Ids of the sandboxes of a host that have a volume, or are about to."""
        query = select(sandboxes.c.id).where(sandboxes.c.host_id == host_id, sandboxes.c.holds_volume)
        return list(connection.execute(query).scalars())

    def get_secrets(self, connection: Connection, sandbox_id: str) -> GuestSecrets:
        """Raises NotFoundError (``sandbox_not_found``)."""
        columns = (sandboxes.c.guest_token, sandboxes.c.machine_id)
        row = connection.execute(select(*columns).where(sandboxes.c.id == sandbox_id)).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no sandbox {sandbox_id!r}", code="sandbox_not_found")
        return GuestSecrets(row[0], row[1])

    def delete(self, connection: Connection, sandbox_id: str) -> None:
        connection.execute(delete(sandboxes).where(sandboxes.c.id == sandbox_id))


def _as_conflict(error: IntegrityError, name: str) -> Exception:
    if "sandboxes.name" not in str(error.orig):
        return error
    return ConflictError(
        f"there is a sandbox named {name} already",
        code="name_taken",
        hint="choose another name, leave it out to have one generated, or remove the other sandbox",
    )


def _to_sandbox(row: Row[Any]) -> Sandbox:
    return Sandbox(
        id=row.id,
        name=row.name,
        host_id=row.host_id,
        state=SandboxState(row.state),
        spec=SandboxSpec(
            image=row.image,
            image_id=row.image_id,
            vcpu_count=row.vcpu_count,
            memory_mib=row.memory_mib,
            disk_mib=row.disk_mib,
            environment=row.environment,
            labels=row.labels,
            auto_stop_after_idle_seconds=row.auto_stop_after_idle_seconds,
            expires_at=row.expires_at,
            owner_id=row.owner_id,
        ),
        created_at=row.created_at,
        updated_at=row.updated_at,
        failure_code=row.failure_code,
        failure_message=row.failure_message,
        failure_hint=row.failure_hint,
        console_tail=row.console_tail,
        stop_reason=StopReason(row.stop_reason) if row.stop_reason else None,
        holds_volume=row.holds_volume,
        file_system_mib=row.file_system_mib,
        last_active_at=row.last_active_at,
        snapshot_id=row.snapshot_id,
        disk_only=row.disk_only,
        purpose=SandboxPurpose(row.purpose),
    )
