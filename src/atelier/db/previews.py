"""Who may visit which port of a sandbox, and what a visit has to know of the sandbox. Called by ``services``."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from atelier.db.tables import preview_ports, sandboxes
from atelier.model.ids import is_sandbox_id
from atelier.model.preview import PortSharing, Visibility
from atelier.model.states import SandboxState

# By hand: every request of every visitor asks.
_FIND = (
    "SELECT sandboxes.id, name, state, failure_message, visibility, generation FROM sandboxes LEFT JOIN preview_ports"
    " ON preview_ports.sandbox_id = sandboxes.id AND port = ? WHERE purpose = 'user' AND "
)


@dataclass(frozen=True, slots=True)
class VisitedPort:
    """A port of a sandbox that exists; whether anything listens there, nobody has asked."""

    sandbox_id: str
    sandbox_name: str
    state: SandboxState
    failure_message: str
    sharing: PortSharing


class PreviewRepository:
    """Stateless: everything stands in the tables. All methods work in the caller's transaction."""

    def find(self, connection: Connection, id_or_name: str, port: int) -> VisitedPort | None:
        """None: there is no such sandbox."""
        column = "sandboxes.id = ?" if is_sandbox_id(id_or_name) else "name = ?"
        row = connection.exec_driver_sql(_FIND + column, (port, id_or_name)).one_or_none()
        if row is None:
            return None
        sharing = PortSharing(port) if row[4] is None else PortSharing(port, Visibility(row[4]), row[5])
        return VisitedPort(row[0], row[1], SandboxState(row[2]), row[3] or "", sharing)

    def list_sharing(self, connection: Connection, sandbox_id: str) -> list[PortSharing]:
        """Of the ports that something was said of."""
        rows = connection.execute(select(preview_ports).where(preview_ports.c.sandbox_id == sandbox_id))
        return [PortSharing(row.port, Visibility(row.visibility), row.generation) for row in rows]

    def put(self, connection: Connection, sandbox_id: str, sharing: PortSharing) -> None:
        values = {"visibility": sharing.visibility.value, "generation": sharing.generation}
        statement = insert(preview_ports).values(sandbox_id=sandbox_id, port=sharing.port, **values)
        connection.execute(statement.on_conflict_do_update(index_elements=["sandbox_id", "port"], set_=values))

    def trim(self, connection: Connection) -> None:
        """Forget what was said of ports of sandboxes that are gone."""
        connection.execute(delete(preview_ports).where(preview_ports.c.sandbox_id.not_in(select(sandboxes.c.id))))
