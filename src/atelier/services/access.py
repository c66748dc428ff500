"""Who may see and use which sandbox and snapshot, and sharing. Asked by the one dependency that authorises requests."""

from __future__ import annotations

from atelier.db.engine import Connection, Database
from atelier.db.sandbox_access import Holding, SandboxAccessRepository
from atelier.db.users import UserRepository
from atelier.model.errors import AccessDeniedError, ConflictError, NotFoundError
from atelier.model.principal import Principal, User


class AccessService:
    """Methods that take a reference return the id, so that a name which changes hands meanwhile misleads nobody."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._access = SandboxAccessRepository()
        self._users = UserRepository()

    def find_sandbox(self, principal: Principal, reference: str, *, as_owner: bool) -> str:
        """``as_owner``: its owner or an admin, and not those with whom it is shared.

        Raises NotFoundError (``sandbox_not_found``) for what the principal may not see, AccessDeniedError
        (``not_owner``).
        """
        with self._database.read() as connection:
            holding = self._access.find_sandbox(connection, reference, principal.user_id)
        return _require(principal, holding, reference, "sandbox", "atelier ls", as_owner=as_owner)

    def find_snapshot(self, principal: Principal, reference: str, *, as_owner: bool) -> str:
        """As ``find_sandbox``; seen by those with whom its sandbox is shared. Raises NotFoundError
        (``snapshot_not_found``), AccessDeniedError (``not_owner``)."""
        with self._database.read() as connection:
            holding = self._access.find_snapshot(connection, reference, principal.user_id)
        return _require(principal, holding, reference, "snapshot", "atelier snapshots", as_owner=as_owner)

    def list_shared_with(self, user_id: str) -> frozenset[str]:
        """Ids of sandboxes, some of which may be gone."""
        with self._database.read() as connection:
            return self._access.list_shared_with(connection, user_id)

    def list_shares(self, sandbox_id: str) -> list[User]:
        with self._database.read() as connection:
            return self._users.list_named(connection, self._access.list_shares(connection, sandbox_id))

    async def share(self, sandbox_id: str, user: str) -> User:
        """``user``: id or e-mail address. Twice is once. Raises NotFoundError (``user_not_found``), ConflictError
        (``already_owner``)."""

        def share(connection: Connection) -> User:
            found = self._users.get(connection, user)
            holding = self._access.find_sandbox(connection, sandbox_id, found.id)
            if holding is None:
                raise NotFoundError(f"there is no sandbox {sandbox_id!r}", code="sandbox_not_found")
            if holding.owner_id == found.id:
                raise ConflictError(f"the sandbox is {found.name}'s already", code="already_owner")
            self._access.share(connection, sandbox_id, found.id)
            return found

        return await self._database.write(share)

    async def unshare(self, sandbox_id: str, user: str) -> None:
        """Raises NotFoundError (``user_not_found``, ``share_not_found``)."""

        def unshare(connection: Connection) -> None:
            found = self._users.get(connection, user)
            if not self._access.unshare(connection, sandbox_id, found.id):
                raise NotFoundError(
                    f"the sandbox is not shared with {found.name}",
                    code="share_not_found",
                    hint="atelier share SANDBOX shows with whom it is",
                )

        await self._database.write(unshare)


def _require(
    principal: Principal, holding: Holding | None, reference: str, what: str, command: str, *, as_owner: bool
) -> str:
    is_owner = holding is not None and (principal.is_admin or holding.owner_id == principal.user_id)
    if holding is None or not (is_owner or holding.is_shared):
        raise NotFoundError(
            f"there is no {what} {reference!r}", code=f"{what}_not_found", hint=f"{command} shows the ones there are"
        )
    if as_owner and not is_owner:
        raise AccessDeniedError(
            f"{what} {reference} is shared with you, and this is its owner's to do", code="not_owner", hint="ask them"
        )
    return holding.id
