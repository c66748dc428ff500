"""Snapshots and forks: take, find, list, delete; what a sandbox that begins from one is like; forks of a running one.

Templates, which Atelier makes for itself, are in nobody's list and answer to nobody's name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from atelier.db.engine import Database
from atelier.db.sandbox_networks import SandboxNetworkRepository
from atelier.db.sandboxes import SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.model.errors import (
    ConflictError,
    HostError,
    InvalidRequestError,
    NotFoundError,
    TimeoutExceededError,
)
from atelier.model.ids import NAME_MAX_LENGTH, new_id, validate_name
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.snapshot import Snapshot, SnapshotPurpose, SnapshotState

_SHOWN = (SnapshotState.READY, SnapshotState.DAMAGED)
"""Nothing half-made is ever listed."""
_OF_USERS = (SnapshotPurpose.USER, SnapshotPurpose.FORK)
_NAME_TRIES = 5
_SUFFIX_LENGTH = 4
_FIXED_BY_SNAPSHOT = ("image", "vcpu_count", "memory_mib")
"""What stands in the memory of a machine, and so cannot be chosen anew."""


class SnapshotService:
    def __init__(self, database: Database, lifecycle: SandboxLifecycle) -> None:
        self._database = database
        self._snapshots = SnapshotRepository()
        self._sandboxes = SandboxRepository()
        self._lifecycle = lifecycle

    async def take(
        self, sandbox: str, name: str | None, *, labels: dict[str, str], keep_last: int | None = None
    ) -> Snapshot:
        """Begin to save a running sandbox, which goes on; the snapshot's row in state ``taking``.

        Raises NotFoundError, InvalidRequestError (name), ConflictError (``name_taken``, ``invalid_state``,
        ``sandbox_busy``).
        """
        row = self._get_sandbox(sandbox)
        if name is not None:
            return await self._lifecycle.snapshots.take(row.id, validate_name(name), labels=labels, keep_last=keep_last)
        return await self._take_named(row, SnapshotPurpose.USER, labels, keep_last)

    async def wait_settled(self, snapshot_id: str, timeout_seconds: float) -> Snapshot:
        """The row once it is neither being taken nor baked, or as it is after ``timeout_seconds``. Raises NotFoundError
        when it was deleted meanwhile."""
        settled = await self._lifecycle.snapshots.wait_settled(snapshot_id, timeout_seconds)
        return settled if settled is not None else self.get(snapshot_id)

    def get(self, reference: str) -> Snapshot:
        """By id or name, in whatever state. Raises NotFoundError (``snapshot_not_found``)."""
        with self._database.read() as connection:
            snapshot = self._snapshots.get(connection, reference)
        if snapshot.purpose not in _OF_USERS:
            raise NotFoundError(
                f"there is no snapshot {reference!r}",
                code="snapshot_not_found",
                hint="atelier snapshots shows the ones there are",
            )
        return snapshot

    def list_page(
        self, limit: int, cursor: str, sandbox: str | None, labels: Mapping[str, str], viewer_id: str | None
    ) -> tuple[list[Snapshot], str | None]:
        """Those that are ready or damaged, oldest first: of all, or of a sandbox (its id or name, which may be gone by
        now), that bear all ``labels``; with the cursor of the next page. ``viewer_id``: only
        those of this user, and of sandboxes shared with them. Raises InvalidRequestError (``invalid_cursor``).
        """
        with self._database.read() as connection:
            return self._snapshots.list_page(
                connection,
                limit,
                cursor or None,
                states=_SHOWN,
                purposes=_OF_USERS,
                sandbox=sandbox,
                labels=labels,
                viewer_id=viewer_id,
            )

    async def delete(self, reference: str) -> None:
        """Returns when nothing of it is left.

        Raises NotFoundError, ConflictError (``snapshot_in_use``, ``snapshot_busy``), HostError (``delete_stuck``).
        """
        await self._lifecycle.snapshots.delete(self.get(reference).id)

    # --- sandboxes from snapshots -------------------------------------------------------------------------------------

    async def begin_from(
        self, reference: str, spec: SandboxSpec, given: Collection[str], *, disk_only: bool
    ) -> tuple[Snapshot, SandboxSpec]:
        """The snapshot, and ``spec`` with the sizes, the image and below its own environment that of the snapshot.
        ``given`` names the fields of ``spec`` that somebody chose; with ``disk_only`` vCPUs and memory may be.

        Raises NotFoundError, ConflictError (``snapshot_not_ready``, ``snapshot_incompatible``), InvalidRequestError
        (``fixed_by_snapshot``, ``disk_cannot_shrink``).
        """
        snapshot = self.get(reference)
        with self._database.read() as connection:
            self._lifecycle.snapshots.check_ready(connection, snapshot.id)
        fixed = _FIXED_BY_SNAPSHOT[:1] if disk_only else _FIXED_BY_SNAPSHOT
        for name in fixed:
            saved, asked = getattr(snapshot, name), getattr(spec, name)
            if name in given and asked != saved:
                raise InvalidRequestError(
                    f"{name} comes from the snapshot {snapshot.name}, which has {saved}, not {asked}",
                    code="fixed_by_snapshot",
                    hint="leave it out; a sandbox from the snapshot's disk alone may have other vCPUs and memory",
                )
        if "disk_mib" in given and spec.disk_mib < snapshot.disk_mib:
            raise InvalidRequestError(
                f"the disk of snapshot {snapshot.name} has {snapshot.disk_mib} MiB and cannot shrink to {spec.disk_mib}",
                code="disk_cannot_shrink",
                hint=f"ask for {snapshot.disk_mib} MiB or more, or leave it out",
            )
        if not disk_only:
            await self._lifecycle.origins.check_fits(snapshot)
        sizes = {
            name: getattr(snapshot, name)
            for name in (*_FIXED_BY_SNAPSHOT, "disk_mib")
            if name in fixed or name not in given
        }
        environment = {**snapshot.environment, **spec.environment}
        return snapshot, replace(spec, image_id=snapshot.image_id, environment=environment, **sizes)

    async def fork(
        self,
        sandbox: str,
        count: int,
        *,
        owner_id: str,
        name_prefix: str | None,
        labels: dict[str, str],
        timeout_seconds: float,
    ) -> list[Sandbox]:
        """Begin ``count`` sandboxes of the user ``owner_id``'s that go on from where the running ``sandbox`` is now; their rows in state
        ``creating``. They have its sizes, network policy, time limits and, beside ``labels``, its labels; they are named
        ``<name_prefix>-<n>``. The one snapshot that this takes is gone with the last of them.

        Raises NotFoundError, InvalidRequestError (name), ConflictError (``invalid_state``, ``sandbox_busy``),
        CapacityError (it says how many would fit; asked for before anything is done), PreconditionError
        (``network_closed``); TimeoutExceededError when the snapshot is not made in ``timeout_seconds``, HostError when it
        cannot be.
        """
        parent = self._get_sandbox(sandbox)
        if name_prefix is not None:
            validate_name(_join(name_prefix, count))
        spec = replace(parent.spec, labels={**parent.spec.labels, **labels}, owner_id=owner_id)
        await self._lifecycle.check_room([spec] * count)
        with self._database.read() as connection:
            policy = SandboxNetworkRepository().get(connection, parent.id).policy
        snapshots = self._lifecycle.snapshots
        taken = await self._take_named(parent, SnapshotPurpose.FORK, {}, None)
        try:
            with snapshots.holding(taken.id):
                await self._until_ready(taken, parent, timeout_seconds)
                for tries_left in reversed(range(_NAME_TRIES)):
                    names = self._free_names(name_prefix or parent.name, count, shorten=name_prefix is None)
                    try:
                        return await self._lifecycle.start_creates(
                            [(name, spec) for name in names], policy, snapshot_id=taken.id
                        )
                    except ConflictError as error:
                        if not tries_left or error.code != "name_taken":
                            raise
                raise AssertionError("the last try has returned or raised")
        except BaseException:
            snapshots.drop_unneeded_soon()
            raise

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _take_named(
        self, sandbox: Sandbox, purpose: SnapshotPurpose, labels: dict[str, str], keep_last: int | None
    ) -> Snapshot:
        """Under a name made from the sandbox's. Raises what ``Snapshots.take`` raises."""
        stem = sandbox.name[: NAME_MAX_LENGTH - _SUFFIX_LENGTH - 1].rstrip("-")
        for tries_left in reversed(range(_NAME_TRIES)):
            name = f"{stem}-{new_id(_SUFFIX_LENGTH)}"
            try:
                return await self._lifecycle.snapshots.take(
                    sandbox.id, name, labels=labels, keep_last=keep_last, purpose=purpose
                )
            except ConflictError as error:
                if not tries_left or error.code != "name_taken":
                    raise
        raise AssertionError("the last try has returned or raised")

    async def _until_ready(self, taken: Snapshot, parent: Sandbox, timeout_seconds: float) -> None:
        settled = await self._lifecycle.snapshots.wait_settled(taken.id, timeout_seconds)
        if settled is None:
            raise TimeoutExceededError(
                f"sandbox {parent.name} was not saved for its forks within {timeout_seconds:g} s",
                hint="nothing was forked; try again with a longer time, or fork a snapshot: atelier create --snapshot",
            )
        if settled.state is not SnapshotState.READY:
            raise HostError(
                f"sandbox {parent.name} could not be saved for its forks: {settled.failure_message}",
                code=settled.failure_code or "snapshot_failed",
                hint=settled.failure_hint or "nothing was forked, and the sandbox goes on; the manager's log has more",
            )

    def _free_names(self, prefix: str, count: int, *, shorten: bool) -> list[str]:
        """The lowest numbers behind ``prefix`` that no sandbox has."""
        names: list[str] = []
        number = 0
        with self._database.read() as connection:
            while len(names) < count:
                number += 1
                name = _join(prefix, number, shorten=shorten)
                if self._sandboxes.find(connection, name) is None:
                    names.append(validate_name(name))
        return names

    def _get_sandbox(self, reference: str) -> Sandbox:
        with self._database.read() as connection:
            return self._sandboxes.get(connection, reference)


def _join(prefix: str, number: int, *, shorten: bool = False) -> str:
    """Cut where it would be too long for a name."""
    end = f"-{number}"
    return (prefix[: NAME_MAX_LENGTH - len(end)].rstrip("-") if shorten else prefix) + end
