"""The tables of users and of who identity providers say that they are. Called by ``services``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError

from atelier.db.tables import identities, users
from atelier.model.errors import ConflictError, NotFoundError
from atelier.model.principal import Role, User


class UserRepository:
    """Stateless: everything stands in the tables. All methods work in the caller's transaction."""

    def insert(self, connection: Connection, user: User) -> None:
        """Raises ConflictError (``email_taken``)."""
        values = {
            "id": user.id,
            "name": user.name,
            "email": user.email or None,
            "role": user.role.value,
            "is_disabled": user.is_disabled,
            "is_local": user.is_local,
            "created_at": user.created_at,
        }
        try:
            connection.execute(insert(users), values)
        except IntegrityError as error:
            raise ConflictError(
                f"there is a user with the address {user.email} already",
                code="email_taken",
                hint="atelier user ls shows the users there are",
            ) from error

    def get(self, connection: Connection, id_or_email: str) -> User:
        """Raises NotFoundError (``user_not_found``)."""
        condition = users.c.email == id_or_email.lower() if "@" in id_or_email else users.c.id == id_or_email
        row = connection.execute(select(users).where(condition)).one_or_none()
        if row is None:
            raise NotFoundError(
                f"there is no user {id_or_email!r}",
                code="user_not_found",
                hint="give the id or e-mail address; admins see the users there are with atelier user ls",
            )
        return _to_user(row)

    def find_local(self, connection: Connection) -> User | None:
        row = connection.execute(select(users).where(users.c.is_local)).one_or_none()
        return None if row is None else _to_user(row)

    def find_by_identity(self, connection: Connection, provider: str, subject: str) -> User | None:
        query = select(users).join(identities, identities.c.user_id == users.c.id)
        row = connection.execute(
            query.where(identities.c.provider == provider, identities.c.subject == subject)
        ).one_or_none()
        return None if row is None else _to_user(row)

    def find_by_email(self, connection: Connection, email: str) -> User | None:
        row = connection.execute(select(users).where(users.c.email == email)).one_or_none()
        return None if row is None else _to_user(row)

    def has_identity(self, connection: Connection, user_id: str, provider: str) -> bool:
        query = select(func.count()).where(identities.c.user_id == user_id, identities.c.provider == provider)
        return connection.execute(query).scalar_one() > 0

    def add_identity(self, connection: Connection, provider: str, subject: str, user_id: str) -> None:
        values = {"provider": provider, "subject": subject, "user_id": user_id}
        connection.execute(sqlite.insert(identities).values(values).on_conflict_do_nothing())

    def list_all(self, connection: Connection) -> list[User]:
        return [_to_user(row) for row in connection.execute(select(users).order_by(users.c.created_at, users.c.id))]

    def list_named(self, connection: Connection, ids: list[str]) -> list[User]:
        """Those of ``ids`` that there are."""
        return [_to_user(row) for row in connection.execute(select(users).where(users.c.id.in_(ids)))]

    def count_other_admins(self, connection: Connection) -> int:
        """Beside the local one; of those who are not disabled."""
        query = select(func.count()).where(users.c.role == Role.ADMIN.value, ~users.c.is_disabled, ~users.c.is_local)
        return connection.execute(query).scalar_one()

    def change(self, connection: Connection, user_id: str, *, role: Role, is_disabled: bool, name: str) -> None:
        values = {"role": role.value, "is_disabled": is_disabled, "name": name}
        connection.execute(update(users).where(users.c.id == user_id).values(values))


def _to_user(row: Row[Any]) -> User:
    return User(
        id=row.id,
        name=row.name,
        email=row.email or "",
        role=Role(row.role),
        is_disabled=row.is_disabled,
        is_local=row.is_local,
        created_at=row.created_at,
    )
