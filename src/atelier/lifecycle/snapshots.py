"""The door to snapshots: take, wait, delete; and what of them goes by itself.

Called by ``services/snapshots.py`` and by ``templates``. Taking is a saga of the
sandbox, all that comes after is one of the snapshot; both go on without the caller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime

from atelier.db.engine import Connection, Database
from atelier.db.sagas import delete_sagas_of, list_open_sagas_of
from atelier.db.sandbox_machines import SandboxMachineRepository
from atelier.db.sandboxes import SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.lifecycle import snapshot_take
from atelier.lifecycle.background import BackgroundTasks
from atelier.lifecycle.snapshot_bake import bake_saga_id
from atelier.lifecycle.snapshot_checks import require_ready
from atelier.lifecycle.snapshot_rows import SnapshotRows, snapshot_topic
from atelier.lifecycle.snapshot_take import take_saga_id
from atelier.model.errors import AtelierError, ConflictError, HostError, NotFoundError
from atelier.model.ids import new_sandbox_id
from atelier.model.snapshot import Snapshot, SnapshotPurpose, SnapshotState
from atelier.model.states import SandboxState
from atelier.saga.executor import Executor
from atelier.saga.log import SagaGoneError
from atelier.telemetry.logs import log_context

_logger = logging.getLogger(__name__)

_UNDER_WAY = (SnapshotState.TAKING, SnapshotState.BAKING, SnapshotState.DELETING)

_NOT_DROPPED = (SnapshotState.TAKING, SnapshotState.DELETING)
_SPENT = (SnapshotState.READY, SnapshotState.DAMAGED, SnapshotState.FAILED)
"""In what states a template may be that another has taken the place of."""


class Snapshots:
    """``now`` is the clock of the rows."""

    def __init__(
        self,
        *,
        database: Database,
        executor: Executor[Connection],
        background: BackgroundTasks,
        rows: SnapshotRows,
        now: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._executor = executor
        self._background = background
        self._rows = rows
        self._now = now
        self._snapshots: SnapshotRepository = rows.repository
        self._sandboxes = SandboxRepository()
        self._machines = SandboxMachineRepository()
        self._held: set[str] = set()
        self._dropping = asyncio.Lock()

    # --- beginning things ---------------------------------------------------------------------------------------------

    async def take(
        self,
        sandbox_id: str,
        name: str,
        *,
        labels: dict[str, str] | None = None,
        keep_last: int | None = None,
        purpose: SnapshotPurpose = SnapshotPurpose.USER,
        template_key: str = "",
    ) -> Snapshot:
        """Begin to save a running sandbox; the snapshot's row in state ``taking``. The sandbox stays ``running``.
        ``keep_last``: once it is ready, older ones of the same sandbox go, so that so many are left, but for those that
        something needs.

        Raises NotFoundError, ConflictError (``name_taken``, ``invalid_state``, ``sandbox_busy``).
        """
        snapshot_id = new_sandbox_id()

        def insert(connection: Connection) -> Snapshot:
            sandbox = self._sandboxes.get(connection, sandbox_id)
            if sandbox.state is not SandboxState.RUNNING:
                raise ConflictError(
                    f"cannot take a snapshot of sandbox {sandbox.name}: it is {sandbox.state}",
                    code="invalid_state",
                    hint="only a running sandbox has a memory to save: start or resume it",
                )
            if under_way := list_open_sagas_of(connection, sandbox_id):
                raise ConflictError(
                    f"cannot take a snapshot of sandbox {sandbox.name}: something else is under way "
                    f"({under_way[0].kind})",
                    code="sandbox_busy",
                    hint="wait for it to end; atelier events shows what goes on",
                )
            self._forget_failed(connection, name)
            now = self._now()
            spec = sandbox.spec
            snapshot = Snapshot(
                id=snapshot_id,
                name=name,
                host_id=sandbox.host_id,
                state=SnapshotState.TAKING,
                purpose=purpose,
                sandbox_id=sandbox.id,
                sandbox_name=sandbox.name,
                parent_id=self._find_parent(connection, sandbox_id),
                base_id=sandbox.snapshot_id,
                keep_last=keep_last,
                image=spec.image,
                image_id=spec.image_id,
                vcpu_count=spec.vcpu_count,
                memory_mib=spec.memory_mib,
                disk_mib=spec.disk_mib,
                file_system_mib=sandbox.file_system_mib,
                machine=self._machines.get_machine(connection, sandbox_id),
                created_at=now,
                updated_at=now,
                labels=labels or {},
                environment=spec.environment,
                template_key=template_key,
                owner_id=spec.owner_id,
            )
            self._rows.begin(connection, snapshot)
            self._executor.insert(
                connection, snapshot_take.KIND, take_saga_id(sandbox_id), sandbox_id, {"snapshot_id": snapshot_id}
            )
            return snapshot

        async def begin() -> Snapshot:
            snapshot = await self._database.write(insert)
            self._go_on(snapshot)
            return snapshot

        return await self._background.unless_interrupted(begin())

    async def delete(self, reference: str) -> None:
        """Delete a snapshot that nothing needs; returns when nothing of it is left. Twice is once.

        Raises NotFoundError, ConflictError (``snapshot_in_use``, ``snapshot_busy``), HostError (``delete_stuck``).
        """
        with self._database.read() as connection:
            snapshot = self._snapshots.get(connection, reference)
        saga_id = bake_saga_id(snapshot.id)

        def mark(connection: Connection, record: object) -> None:
            present = self._snapshots.get(connection, snapshot.id)
            if present.state is not SnapshotState.DELETING:
                self._check_deletable(connection, present)
            self._rows.move(connection, snapshot.id, SnapshotState.DELETING)

        def drop(connection: Connection) -> None:
            present = self._snapshots.get(connection, snapshot.id)
            self._check_deletable(connection, present)
            self._rows.end(connection, snapshot.id)

        try:
            with log_context(sandbox_id=snapshot.sandbox_id):
                await self._background.unless_interrupted(self._executor.request_unwind(saga_id, mark))
        except SagaGoneError:
            # It failed before there was anything to bake.
            await self._database.write(drop)
            return
        record = await self._executor.wait(saga_id)
        if record is not None and record.is_stuck:
            raise HostError(
                f"the snapshot {snapshot.name} cannot be deleted: {record.error.get('message', 'see the log')}",
                code="delete_stuck",
                hint=record.error.get("hint") or "remove what is in the way, then delete it again",
            )

    def _check_deletable(self, connection: Connection, snapshot: Snapshot) -> None:
        if snapshot.state is SnapshotState.TAKING:
            raise ConflictError(
                f"the snapshot {snapshot.name} is being taken",
                code="snapshot_busy",
                hint="wait until it is ready, then delete it",
            )
        sandboxes, children = self._snapshots.list_dependants(connection, snapshot.id)
        if snapshot.purpose is not SnapshotPurpose.TEMPLATE and (sandboxes or children):
            needed = [*(f"sandbox {name}" for name in sandboxes), *(f"snapshot {name}" for name in children)]
            raise ConflictError(
                f"the snapshot {snapshot.name} is needed by {', '.join(needed[:10])}"
                + (f" and {len(needed) - 10} more" if len(needed) > 10 else ""),
                code="snapshot_in_use",
                hint="their disks stand over its disk: remove them first (atelier rm, atelier snapshots rm)",
            )

    def check_ready(self, connection: Connection, snapshot_id: str) -> None:
        """In the transaction that begins a sandbox from it. Raises NotFoundError, ConflictError
        (``snapshot_not_ready``)."""
        require_ready(self._snapshots.get(connection, snapshot_id))

    # --- what goes by itself ------------------------------------------------------------------------------------------

    @contextmanager
    def holding(self, snapshot_id: str) -> Generator[None]:
        """Nothing of this goes by itself: somebody is about to begin sandboxes from it."""
        self._held.add(snapshot_id)
        try:
            yield
        finally:
            self._held.discard(snapshot_id)

    def drop_unneeded_soon(self) -> None:
        self._background.spawn(self.drop_unneeded(), "drop snapshots that nothing needs")

    async def drop_unneeded(self) -> None:
        """Delete what was made for forks and is needed by none any more, and what is older than was to be kept
        (``keep_last``). After destroys and bakes, and the body of a background loop."""
        async with self._dropping:
            with self._database.read() as connection:
                forks = self._snapshots.list_unneeded_forks(connection)
                ready = self._snapshots.list_in(connection, [SnapshotState.READY], [SnapshotPurpose.USER])
            spent = [each for each in forks if each.id not in self._held and each.state not in _NOT_DROPPED]
            for snapshot in [*spent, *_beyond_kept(ready)]:
                try:
                    await self.delete(snapshot.id)
                except (ConflictError, NotFoundError):
                    continue
                except AtelierError as error:
                    _logger.warning("the snapshot %s, which nothing needs, stays for now: %s", snapshot.name, error)

    async def drop_superseded(self, made: Snapshot) -> None:
        """Delete the templates for the same creates as ``made`` that fit no more, or are damaged."""
        with self._database.read() as connection:
            templates = self._snapshots.list_in(connection, _SPENT, [SnapshotPurpose.TEMPLATE])
        for template in templates:
            same = (template.image, template.vcpu_count, template.memory_mib)
            if template.id != made.id and same == (made.image, made.vcpu_count, made.memory_mib):
                try:
                    await self.delete(template.id)
                except AtelierError as error:
                    _logger.warning("the template %s, which serves nobody, stays for now: %s", template.name, error)

    # --- waiting and finding ------------------------------------------------------------------------------------------

    async def wait_settled(self, snapshot_id: str, timeout_seconds: float | None) -> Snapshot | None:
        """The row once it is neither being taken nor baked; None after ``timeout_seconds``. Raises NotFoundError when it
        is gone."""
        with self._database.subscribe(snapshot_topic(snapshot_id)) as news:
            try:
                async with asyncio.timeout(timeout_seconds):
                    while True:
                        news.clear()
                        with self._database.read() as connection:
                            snapshot = self._snapshots.get(connection, snapshot_id)
                        if snapshot.state not in _UNDER_WAY or snapshot.failure_code:
                            return snapshot
                        await news.wait()
            except TimeoutError:
                return None

    # --- inside -------------------------------------------------------------------------------------------------------

    def _find_parent(self, connection: Connection, sandbox_id: str) -> str | None:
        """The sandbox's own latest snapshot, else the one that it began from."""
        own = [each for each in self._snapshots.list_in(connection) if each.sandbox_id == sandbox_id]
        ready = [each.id for each in own if each.state in (SnapshotState.READY, SnapshotState.BAKING)]
        return ready[-1] if ready else self._sandboxes.find_origin(connection, sandbox_id)

    def _forget_failed(self, connection: Connection, name: str) -> None:
        """Nothing is left of a snapshot that failed but the words: its name is free."""
        failed = self._snapshots.find(connection, name)
        if failed is None or failed.state is not SnapshotState.FAILED:
            return
        if not any(list_open_sagas_of(connection, each) for each in (failed.id, failed.sandbox_id)):
            self._rows.end(connection, failed.id)
            delete_sagas_of(connection, failed.id)

    def _go_on(self, snapshot: Snapshot) -> None:
        with log_context(sandbox_id=snapshot.sandbox_id):
            self._executor.start(take_saga_id(snapshot.sandbox_id))
            self._background.spawn(self._bake_after(snapshot), f"bake {snapshot.id}")

    async def _bake_after(self, snapshot: Snapshot) -> None:
        await self._executor.wait(take_saga_id(snapshot.sandbox_id))
        try:
            with self._database.read() as connection:
                state = self._snapshots.get(connection, snapshot.id).state
        except NotFoundError:
            return
        if state is SnapshotState.BAKING:
            with log_context(sandbox_id=snapshot.sandbox_id):
                self._executor.start(bake_saga_id(snapshot.id))
            await self._executor.wait(bake_saga_id(snapshot.id))
            await self.drop_unneeded()


def _beyond_kept(ready: list[Snapshot]) -> list[Snapshot]:
    """Of snapshots in the order in which they were taken, those that their sandbox's latest one does not keep."""
    by_sandbox: dict[str, list[Snapshot]] = {}
    for snapshot in ready:
        by_sandbox.setdefault(snapshot.sandbox_id, []).append(snapshot)
    return [
        snapshot
        for own in by_sandbox.values()
        if (keep_last := own[-1].keep_last) is not None
        for snapshot in own[:-keep_last]
    ]
