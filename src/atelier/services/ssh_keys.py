"""Users' public keys for SSH, and who may enter which sandbox by one. Called by the routes and by the manager's answers to
the gateway."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from atelier.db.engine import Connection, Database
from atelier.db.ssh_keys import SshKeyRepository
from atelier.lifecycle.activity import Activity
from atelier.model.errors import AccessDeniedError, ConflictError, NotFoundError, PreconditionError
from atelier.model.ids import new_sandbox_id
from atelier.model.principal import Principal
from atelier.model.ssh_key import SshAddress, SshKey, parse_public_key
from atelier.model.states import SandboxState
from atelier.services.access import AccessService
from atelier.services.accounts import AccountService
from atelier.services.audit import AuditLog
from atelier.services.sandboxes import SandboxService

_WAKE_SECONDS = 300.0
"""How long somebody waits at most for a sandbox that boots; they see that they do, and can go away."""
_STARTED_BY_SSH = frozenset({SandboxState.STOPPED, SandboxState.PAUSED})


@dataclass(frozen=True, slots=True)
class Entry:
    """Somebody who may enter a sandbox."""

    sandbox_id: str
    principal: Principal
    key_id: str


class SshKeyService:
    """``address``: where SSH is served, as far as this is known."""

    def __init__(
        self,
        database: Database,
        accounts: AccountService,
        access: AccessService,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._accounts = accounts
        self._access = access
        self._now = now
        self._keys = SshKeyRepository()
        self.address = SshAddress("", 0, "", "SSH is not served by this manager")

    def list_keys(self, principal: Principal, *, everybodys: bool) -> list[SshKey]:
        """Raises AccessDeniedError when somebody else than an admin asks for everybody's."""
        with self._database.read() as connection:
            return self._keys.list_of(connection, self._accounts.whose(principal, everybodys=everybodys))

    async def add_key(self, principal: Principal, text: str, name: str, *, user: str | None = None) -> SshKey:
        """``text``: the line of a ``.pub`` file. ``name`` empty: its comment. ``user``: whose it is to be, if not the
        principal's own.

        Raises InvalidRequestError (``invalid_ssh_key``, ``ssh_key_is_private``, ``ssh_key_too_weak``), ConflictError
        (``ssh_key_exists``), AccessDeniedError (``admin_only``), NotFoundError (``user_not_found``).
        """
        user_id = self._accounts.find_other(principal, user)
        public = parse_public_key(text)
        key = SshKey(new_sandbox_id(), user_id, name or public.comment or public.type, public, self._now())
        await self._database.write(lambda connection: self._keys.insert(connection, key))
        return key

    async def delete_key(self, principal: Principal, key_id: str) -> None:
        """The user's own; an admin any. Raises NotFoundError (``ssh_key_not_found``)."""

        def delete(connection: Connection) -> None:
            key = self._keys.find(connection, key_id)
            if key is None or (principal.viewer_id is not None and key.user_id != principal.viewer_id):
                raise NotFoundError(
                    f"there is no SSH key {key_id!r}",
                    code="ssh_key_not_found",
                    hint="atelier ssh-key ls shows yours",
                )
            self._keys.delete(connection, key_id)

        await self._database.write(delete)

    def find_holders(self, blob: str) -> list[tuple[Principal, str]]:
        """Whose key this is (base64), with the key's id."""
        with self._database.read() as connection:
            return self._keys.list_holders(connection, blob)

    def find_entry(self, reference: str, blob: str) -> Entry:
        """The sandbox, and as whom the holder of the key may enter it. Raises AccessDeniedError (``ssh_refused``),
        which does not say whether it is the sandbox or the key that is unknown."""
        for principal, key_id in self.find_holders(blob):
            with suppress(NotFoundError):
                return Entry(self._access.find_sandbox(principal, reference, as_owner=False), principal, key_id)
        raise AccessDeniedError("there is no such sandbox for this key", code="ssh_refused")


class SshEntry:
    """What the manager does for somebody who has shown that the key is theirs."""

    def __init__(self, keys: SshKeyService, sandboxes: SandboxService, activity: Activity, audit: AuditLog) -> None:
        self._keys = keys
        self._sandboxes = sandboxes
        self._activity = activity
        self._audit = audit

    async def enter(self, sandbox_id: str, blob: str, address: str) -> None:
        """Return once the sandbox runs; one that is stopped or paused is started for this. Written to the audit log.

        Raises AccessDeniedError (``ssh_refused``), PreconditionError (``sandbox_not_running``), NotFoundError,
        CapacityError.
        """
        entry = self._keys.find_entry(sandbox_id, blob)
        self._audit.note(
            entry.principal, "enter_by_ssh", entry.sandbox_id, 200, address, through=f"ssh key {entry.key_id}"
        )
        self._activity.touch(entry.sandbox_id)
        row = self._sandboxes.get(entry.sandbox_id)
        if row.state is SandboxState.RUNNING:
            return
        if row.state not in _STARTED_BY_SSH:
            row, _ = await self._sandboxes.wait_settled(row.id, _WAKE_SECONDS)
        if row.state in _STARTED_BY_SSH:
            with suppress(ConflictError):  # somebody else has begun the same meanwhile
                await (self._sandboxes.start if row.state is SandboxState.STOPPED else self._sandboxes.resume)(row.id)
            row, _ = await self._sandboxes.wait_settled(row.id, _WAKE_SECONDS)
        if row.state is not SandboxState.RUNNING:
            reason = f": {row.failure_message}" if row.failure_message else ""
            raise PreconditionError(
                f"sandbox {row.name} is {row.state.value}{reason}",
                code="sandbox_not_running",
                hint=f"atelier start {row.name}",
            )

    def note_use(self, sandbox_id: str) -> None:
        self._activity.touch(sandbox_id)
