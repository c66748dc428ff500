"""Whose sandboxes and snapshots are, and with whom sandboxes are shared. Called by ``services``."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, or_, select, update
from sqlalchemy.dialects.sqlite import insert

from atelier.db.tables import outbox, sandbox_shares, sandboxes, snapshots
from atelier.model.ids import is_sandbox_id

_SHARED = "EXISTS (SELECT 1 FROM sandbox_shares WHERE sandbox_id = {sandbox} AND user_id = ?)"
# By hand: every request asks, and SQLAlchemy would spend more time on it than SQLite.
_FIND_SANDBOX = f"SELECT id, owner_id, {_SHARED.format(sandbox='sandboxes.id')} FROM sandboxes WHERE "  # noqa: S608
_FIND_SNAPSHOT = f"SELECT id, owner_id, {_SHARED.format(sandbox='snapshots.sandbox_id')} FROM snapshots WHERE "  # noqa: S608


@dataclass(frozen=True, slots=True)
class Holding:
    """What a user has to do with a thing. ``is_shared``: with that user."""

    id: str
    owner_id: str
    is_shared: bool


def visible_to(user_id: str, owner_id: ColumnElement[str], sandbox_id: ColumnElement[str]) -> ColumnElement[bool]:
    """The condition on rows with these columns: the user's own, and those of sandboxes shared with them."""
    shared = select(sandbox_shares.c.sandbox_id).where(sandbox_shares.c.user_id == user_id)
    return or_(owner_id == user_id, sandbox_id.in_(shared))


class SandboxAccessRepository:
    """Stateless: everything stands in the tables. All methods work in the caller's transaction."""

    def find_sandbox(self, connection: Connection, id_or_name: str, user_id: str) -> Holding | None:
        return _find(connection, _FIND_SANDBOX, id_or_name, user_id)

    def find_snapshot(self, connection: Connection, id_or_name: str, user_id: str) -> Holding | None:
        """``is_shared``: the sandbox that it was taken of is, or was when it was destroyed."""
        return _find(connection, _FIND_SNAPSHOT, id_or_name, user_id)

    def list_shares(self, connection: Connection, sandbox_id: str) -> list[str]:
        """Ids of the users with whom it is shared."""
        query = select(sandbox_shares.c.user_id).where(sandbox_shares.c.sandbox_id == sandbox_id)
        return list(connection.execute(query.order_by(sandbox_shares.c.user_id)).scalars())

    def list_shared_with(self, connection: Connection, user_id: str) -> frozenset[str]:
        """Ids of the sandboxes."""
        query = select(sandbox_shares.c.sandbox_id).where(sandbox_shares.c.user_id == user_id)
        return frozenset(connection.execute(query).scalars())

    def share(self, connection: Connection, sandbox_id: str, user_id: str) -> None:
        statement = insert(sandbox_shares).values(sandbox_id=sandbox_id, user_id=user_id)
        connection.execute(statement.on_conflict_do_nothing())

    def unshare(self, connection: Connection, sandbox_id: str, user_id: str) -> bool:
        """Whether it was shared."""
        gone = delete(sandbox_shares).where(
            sandbox_shares.c.sandbox_id == sandbox_id, sandbox_shares.c.user_id == user_id
        )
        return connection.execute(gone).rowcount > 0

    def adopt(self, connection: Connection, user_id: str) -> None:
        """What users made before there were owners becomes this user's."""
        connection.execute(
            update(sandboxes).where(sandboxes.c.owner_id == "", sandboxes.c.purpose == "user").values(owner_id=user_id)
        )
        connection.execute(
            update(snapshots)
            .where(snapshots.c.owner_id == "", snapshots.c.purpose != "template")
            .values(owner_id=user_id)
        )

    def trim_shares(self, connection: Connection) -> None:
        """Forget shares of sandboxes that are gone, and of which nobody can read an event or snapshot any more."""
        known = sandbox_shares.c.sandbox_id
        connection.execute(
            delete(sandbox_shares).where(
                known.not_in(select(sandboxes.c.id)),
                known.not_in(select(snapshots.c.sandbox_id)),
                known.not_in(select(outbox.c.sandbox_id).where(outbox.c.sandbox_id.is_not(None))),
            )
        )


def _find(connection: Connection, query: str, id_or_name: str, user_id: str) -> Holding | None:
    column = "id = ?" if is_sandbox_id(id_or_name) else "name = ?"
    row = connection.exec_driver_sql(query + column, (user_id, id_or_name)).one_or_none()
    return None if row is None else Holding(row[0], row[1], bool(row[2]))
