"""What the table of sandboxes knows of their machines: what each is made of, and its memory while it is paused.

Called by ``lifecycle``. Apart from ``SandboxRepository``, whose rows are read by the hundred.
"""

from __future__ import annotations

from sqlalchemy import Connection, bindparam, select, update

from atelier.db.tables import sandboxes
from atelier.model.errors import NotFoundError
from atelier.model.saved_machine import MachineRecord, SavedMemory

_FIND = select(sandboxes.c.machine, sandboxes.c.saved_memory).where(sandboxes.c.id == bindparam("sandbox_id"))
_UPDATE = update(sandboxes).where(sandboxes.c.id == bindparam("sandbox_id"))


class SandboxMachineRepository:
    """Stateless: everything stands in the table. All methods work in the caller's transaction."""

    def get_machine(self, connection: Connection, sandbox_id: str) -> MachineRecord:
        """Raises NotFoundError (``machine_unknown``) for one that has not run since this was written down."""
        row = connection.execute(_FIND, {"sandbox_id": sandbox_id}).one_or_none()
        if row is None or row.machine is None:
            raise NotFoundError(
                f"it is not known what the machine of sandbox {sandbox_id} is made of",
                code="machine_unknown",
                hint="it was started by an older Atelier: restart it once",
            )
        return MachineRecord.from_json(row.machine)

    def set_machine(self, connection: Connection, sandbox_id: str, machine: MachineRecord) -> None:
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "machine": machine.to_json()})

    def find_saved_memory(self, connection: Connection, sandbox_id: str) -> SavedMemory | None:
        row = connection.execute(_FIND, {"sandbox_id": sandbox_id}).one_or_none()
        return None if row is None or row.saved_memory is None else SavedMemory.from_json(row.saved_memory)

    def set_saved_memory(self, connection: Connection, sandbox_id: str, saved: SavedMemory | None) -> None:
        stored = None if saved is None else saved.to_json()
        connection.execute(_UPDATE, {"sandbox_id": sandbox_id, "saved_memory": stored})
