"""The door to a sandbox's life: create, stop, start, pause, resume, resize, destroy, wait; recover after a start; what goes on by itself.

Called by ``services/sandboxes.py`` and the manager's program. Work goes on in the background, in the saga executor's
tasks and one watcher per running sandbox; a caller that goes away stops nothing. Nothing here knows a concrete driver.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

from atelier.db.engine import Connection, Database
from atelier.db.sagas import list_open_sagas_of
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle import operations
from atelier.lifecycle.activity import Activity, utc_now
from atelier.lifecycle.admission import HostRoom, RoomPolicy, Wish, check_admission
from atelier.lifecycle.composition import HostDrivers, LifecycleLimits, compose
from atelier.lifecycle.creation import Creation, check_expiry
from atelier.lifecycle.machines import Machines
from atelier.lifecycle.operations import Operation
from atelier.lifecycle.reclaim import Reclaim
from atelier.lifecycle.saga_ends import failure_of
from atelier.lifecycle.sandbox_create import create_saga_id, has_booted
from atelier.lifecycle.templates import Templates
from atelier.lifecycle.time_limits import TimeLimits
from atelier.lifecycle.transitions import sandbox_topic
from atelier.model.errors import (
    AtelierError,
    CapacityError,
    ConflictError,
    HostError,
    InvalidRequestError,
    NotFoundError,
)
from atelier.model.layout import DataLayout, RunLayout
from atelier.model.sandbox import Sandbox, SandboxPurpose, SandboxSpec
from atelier.model.states import UNDER_WAY, SandboxState, StopReason
from atelier.saga.log import SagaGoneError, SagaRecord
from atelier.saga.retry import RetryPolicies
from atelier.telemetry.logs import log_context

_logger = logging.getLogger(__name__)


class SandboxLifecycle:
    """``room`` says how much of this host is for sandboxes; ``host_id`` stands in their rows, and is the installation's
    id where nothing else is said; ``now`` is the clock of the time limits."""

    def __init__(
        self,
        *,
        database: Database,
        vmm: VmmDriver,
        storage: StorageDriver,
        network: NetworkDriver,
        images: ImageDriver,
        guests: GuestDriver,
        data: DataLayout,
        run: RunLayout,
        installation_id: str,
        host_id: str = "",
        room: RoomPolicy | None = None,
        limits: LifecycleLimits | None = None,
        policies: RetryPolicies | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        drivers = HostDrivers(vmm, storage, network, images, guests)
        parts = compose(
            database=database,
            drivers=drivers,
            data=data,
            run=run,
            installation_id=installation_id,
            limits=limits or LifecycleLimits(),
            policies=policies,
            now=now,
            begin_start=self._write_restart,
        )
        self._database = database
        self._vmm = vmm
        self._network = network
        self._run = run
        self._host_id = host_id or installation_id
        self._now = now
        self._room = HostRoom(
            database, self._host_id, vmm=vmm, storage=storage, network=network, policy=room or RoomPolicy()
        )
        self._sandboxes = parts.sandboxes
        self._transitions = parts.transitions
        self._consoles = parts.consoles
        self._background = parts.background
        self._executor = parts.executor
        self.network_policies = parts.network_policies
        self.snapshots = parts.snapshots
        self.snapshot_checks = parts.checks
        self.origins = parts.origins
        creation = Creation(
            database=database,
            executor=self._executor,
            transitions=self._transitions,
            images=images,
            network=network,
            network_policies=self.network_policies,
            snapshots=self.snapshots,
            room=self._room,
            background=self._background,
            host_id=self._host_id,
            now=now,
            go_on=self._go_on,
            destroy_pooled=lambda each: self.destroy(each, only=SandboxPurpose.POOL),
        )
        self._make_room = creation.make_room
        self.start_create = creation.start_create
        self.start_creates = creation.start_creates
        self.check_room = creation.check_room
        self.warm_pools = creation.warm_pools
        self.templates = Templates(
            database=database,
            images=images,
            guests=guests,
            origins=parts.origins,
            snapshots=parts.snapshots,
            background=parts.background,
            create=creation.start_create,
            settle=self.wait_settled,
            destroy=self.destroy,
            share=parts.shared_templates.put,
        )
        self.sagas = parts.sagas
        """Every saga there is, for tests."""
        self._machines = Machines(
            database=database,
            transitions=self._transitions,
            vmm=vmm,
            guests=guests,
            run=run,
            consoles=self._consoles,
            spawn=self._background.spawn,
            boot_again=self._boot_again,
        )
        self.reclaim = Reclaim(
            database=database,
            vmm=vmm,
            storage=storage,
            network=network,
            guests=guests,
            run=run,
            consoles=self._consoles,
        )
        self.activity = Activity(now)
        """Who uses a sandbox says so here."""
        self.time_limits = TimeLimits(
            database, self.activity, now, stop=self._stop_idle, destroy=lambda each: self.destroy(each, wait=False)
        )

    # --- beginning things ---------------------------------------------------------------------------------------------

    async def start(self, sandbox_id: str) -> Sandbox:
        """Begin to boot a stopped or failed sandbox from its disk; its row in state ``starting``. Twice is once.

        Raises NotFoundError, ConflictError (``invalid_state``, ``sandbox_busy``), CapacityError.
        """
        return await self._begin_start(operations.START, sandbox_id)

    async def stop(
        self,
        sandbox_id: str,
        *,
        grace_seconds: float | None = None,
        reason: StopReason = StopReason.REQUESTED,
        then_start: bool = False,
    ) -> Sandbox:
        """Begin to stop a running sandbox; its row in state ``stopping``. Its guest has ``grace_seconds`` to shut down,
        then it is cut off. ``then_start``: start it again afterwards, also over a restart of the manager. Twice is
        once.

        Raises NotFoundError, ConflictError (``invalid_state``, ``sandbox_busy``).
        """
        inputs: dict[str, Any] = {"reason": reason.value, "then_start": then_start}
        if grace_seconds is not None:
            inputs["grace_seconds"] = grace_seconds
        return await self._begin(operations.STOP, sandbox_id, inputs)

    async def pause(self, sandbox_id: str) -> Sandbox:
        """Begin to put a running sandbox on disk, its memory included; its row in state ``pausing``. It takes no memory
        and no processor afterwards, and its processes know nothing of it. Twice is once.

        Raises NotFoundError, ConflictError (``invalid_state``, ``sandbox_busy``).
        """
        return await self._begin(operations.PAUSE, sandbox_id)

    async def resume(self, sandbox_id: str, *, from_disk: bool = False) -> Sandbox:
        """Begin to let a paused sandbox go on where it stood; its row in state ``resuming``. ``from_disk``: boot it from
        its disk instead, and give its memory up. Twice is once.

        Raises NotFoundError, ConflictError (``invalid_state``, ``sandbox_busy``), CapacityError.
        """
        operation = operations.BOOT_FROM_DISK if from_disk else operations.RESUME
        return await self._begin_start(operation, sandbox_id)

    async def resize(self, sandbox_id: str, disk_mib: int) -> Sandbox:
        """Begin to grow the disk of a running or stopped sandbox. The same size again is no work.

        Raises NotFoundError, InvalidRequestError (``disk_cannot_shrink``), ConflictError (``invalid_state``,
        ``sandbox_busy``), CapacityError.
        """

        def find_wish(sandbox: Sandbox) -> Wish:
            present = sandbox.spec.disk_mib
            if disk_mib < present:
                raise InvalidRequestError(
                    f"the disk of sandbox {sandbox.name} has {present} MiB and cannot shrink to {disk_mib} MiB",
                    code="disk_cannot_shrink",
                    hint=f"ask for more than {present} MiB, or make a new sandbox",
                )
            return Wish(disk_mib=disk_mib - present)

        def promise(connection: Connection) -> None:
            self._sandboxes.set_disk_mib(connection, sandbox_id, disk_mib)

        return await self._begin_with_room(operations.RESIZE, sandbox_id, {"disk_mib": disk_mib}, find_wish, promise)

    async def retry(self, sandbox_id: str) -> Sandbox:
        """Try again what is stuck, after a person has mended what was in the way.

        Raises NotFoundError, ConflictError (``nothing_stuck``).
        """

        def clear(connection: Connection) -> list[SagaRecord]:
            sandbox = self._sandboxes.get(connection, sandbox_id)
            stuck = [record for record in list_open_sagas_of(connection, sandbox_id) if record.is_stuck]
            if not stuck:
                raise ConflictError(
                    f"nothing is stuck in sandbox {sandbox.name}: it is {sandbox.state}",
                    code="nothing_stuck",
                    hint="only what is stuck can be tried again; a failed sandbox can be started",
                )
            # A failed one says again why it failed, without that cleaning up is stuck.
            failure = failure_of(stuck[0].failure) if sandbox.state is SandboxState.FAILED else None
            self._transitions.restate(connection, sandbox_id, failure)
            return stuck

        async def begin() -> None:
            for record in await self._database.write(clear):
                self._go_on(sandbox_id, record.id)

        await self._background.unless_interrupted(begin())
        return self._get(sandbox_id)

    async def set_time_limits(self, sandbox_id: str, change: Callable[[SandboxSpec], SandboxSpec]) -> Sandbox:
        """``change`` makes the new limits from the present ones, so that two callers lose nothing of each other's.

        Raises NotFoundError, InvalidRequestError (``expiry_in_past``).
        """

        def write(connection: Connection) -> None:
            spec = self._sandboxes.get(connection, sandbox_id).spec
            changed = change(spec)
            if changed.expires_at != spec.expires_at:
                check_expiry(changed, self._now())
            self._sandboxes.set_time_limits(connection, sandbox_id, changed)

        await self._database.write(write)
        return self._get(sandbox_id)

    async def destroy(self, sandbox_id: str, *, wait: bool = True, only: SandboxPurpose | None = None) -> None:
        """Destroy a sandbox, whatever it is doing: the wish is durable when this has begun to wait. With ``wait``
        returns when nothing is left; twice is once. ``only``: unless it serves another purpose by now.

        Raises NotFoundError; HostError (``destroy_stuck``) when something cannot be freed, which a later call tries
        again; ConflictError (``purpose_changed``), and then nothing has happened.
        """
        saga_id = create_saga_id(sandbox_id)

        def mark(connection: Connection, record: object) -> None:
            sandbox = self._sandboxes.get(connection, sandbox_id)
            if only is not None and sandbox.purpose is not only:
                raise ConflictError(
                    f"sandbox {sandbox.name} is in no {only} any more", code="purpose_changed", hint="leave it alone"
                )
            if sandbox.state is SandboxState.DESTROYING:
                self._transitions.restate(connection, sandbox_id, None)
            else:
                self._transitions.apply(connection, sandbox_id, SandboxState.DESTROYING)

        async def request() -> None:
            with log_context(sandbox_id=sandbox_id):
                await self._executor.request_unwind(saga_id, mark)
                self._background.spawn(self._drop_after(saga_id), f"drop what {sandbox_id} needed")

        try:
            await self._background.unless_interrupted(request())
        except SagaGoneError:
            raise NotFoundError(
                f"there is no sandbox {sandbox_id!r}",
                code="sandbox_not_found",
                hint="atelier ls shows the ones there are",
            ) from None
        self.activity.forget(sandbox_id)
        if not wait:
            return
        record = await self._executor.wait(saga_id)
        if record is None:
            return
        if record.is_stuck:
            raise HostError(
                f"sandbox {sandbox_id} cannot be removed: {record.error.get('message', 'see the log')}",
                code="destroy_stuck",
                hint=record.error.get("hint") or f"remove what is in the way, then: atelier rm {sandbox_id}",
            )
        raise HostError(
            f"the manager ended before sandbox {sandbox_id} was removed",
            code="interrupted",
            hint="the next start goes on with it",
        )

    # --- looking ------------------------------------------------------------------------------------------------------

    async def wait_settled(self, sandbox_id: str, timeout_seconds: float | None) -> Sandbox | None:
        """The row once nothing is under way with the sandbox (or what is under way is stuck: ``failure_code``); None
        after ``timeout_seconds``. Raises NotFoundError when it is gone."""
        with self._database.subscribe(sandbox_topic(sandbox_id)) as news:
            limit = asyncio.timeout(timeout_seconds)
            try:
                async with limit:
                    while True:
                        news.clear()
                        with self._database.read() as connection:
                            sandbox = self._sandboxes.get(connection, sandbox_id)
                            is_busy = bool(list_open_sagas_of(connection, sandbox_id))
                        if sandbox.failure_code or not (is_busy or sandbox.state in UNDER_WAY):
                            return sandbox
                        await news.wait()
            except TimeoutError:
                return None

    async def console(self, sandbox: Sandbox, limit_bytes: int) -> bytes:
        """The newest bytes of the serial console, as the guest wrote them; of a stopped or failed sandbox those that
        were kept of its last run."""
        if sandbox.state in (SandboxState.FAILED, SandboxState.STOPPED):
            kept = await self._consoles.read(sandbox.id, limit_bytes)
            if kept:
                return kept
        return await self._vmm.console_tail(self._run.vmm_directory(sandbox.id), limit_bytes)

    # --- what goes on by itself ---------------------------------------------------------------------------------------

    async def recover(self) -> None:
        """After a start: take up what the last process left half-way (it goes on in the background), find the machines
        that still run, give all network policies again, and free what has no owner."""
        self.network_policies.doubt_all()
        for record in await self._executor.recover():
            _logger.info("found %s of %s %s", record.kind, record.subject_id, record.status)
            self._background.spawn(self._supervise(record.subject_id, record.id), f"supervise {record.id}")
        await self.reconcile()
        self._background.spawn(self.templates.clear(), "clear templates that are half made")
        self._background.spawn(self.network_policies.enforce_pending(), "give the network policies again")

    async def reconcile(self) -> None:
        """Bring what is there and what is written down together. The body of a background loop, too."""
        await self._machines.adopt(self._ids(SandboxState.RUNNING))
        try:
            await self.reclaim.free_orphans()
        except AtelierError as error:
            _logger.error("what has no owner cannot be looked for: %s", error)

    async def close(self) -> None:
        """Stop watching and stop sagas where they are; machines go on. The next start takes up what is open."""
        await self._executor.close()
        await self._background.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _begin(
        self,
        operation: Operation,
        sandbox_id: str,
        inputs: dict[str, Any] | None = None,
        also: Callable[[Connection, Sandbox], None] | None = None,
    ) -> Sandbox:
        """Check, promise, change the state and write the saga in one transaction; then run it."""
        saga_id = operation.saga_id(sandbox_id)

        def write(connection: Connection) -> bool:
            sandbox = self._sandboxes.get(connection, sandbox_id)
            under_way = list_open_sagas_of(connection, sandbox_id)
            if sandbox.state is operation.meanwhile and any(record.id == saga_id for record in under_way):
                return False
            operation.check(sandbox)
            if under_way:
                raise ConflictError(
                    f"cannot {operation.verb} sandbox {sandbox.name}: something else is under way ({under_way[0].kind})",
                    code="sandbox_busy",
                    hint="wait for it to end; atelier events shows what goes on",
                )
            if also is not None:
                also(connection, sandbox)
            if operation.meanwhile is not None:
                self._transitions.apply(connection, sandbox_id, operation.meanwhile)
            self._executor.insert(connection, operation.kind, saga_id, sandbox_id, inputs)
            return True

        async def begin() -> None:
            if await self._database.write(write):
                self._go_on(sandbox_id, saga_id)

        await self._background.unless_interrupted(begin())
        return self._get(sandbox_id)

    async def _begin_with_room(
        self,
        operation: Operation,
        sandbox_id: str,
        inputs: dict[str, Any],
        find_wish: Callable[[Sandbox], Wish],
        promise: Callable[[Connection], None],
    ) -> Sandbox:
        """As ``_begin``, where this host has room for the wish; what only waits in a warm pool gives way to it."""

        async def begin() -> Sandbox:
            capacity = await self._room.measure()

            def check(connection: Connection, sandbox: Sandbox) -> None:
                check_admission(capacity, self._sandboxes.sum_usage(connection, self._host_id), find_wish(sandbox))
                promise(connection)

            return await self._begin(operation, sandbox_id, inputs, check)

        while True:
            try:
                return await begin()
            except CapacityError:
                if not await self._make_room(find_wish(self._get(sandbox_id))):
                    raise

    async def _begin_start(self, operation: Operation, sandbox_id: str) -> Sandbox:
        with self._database.read() as connection:
            fresh = not self._sandboxes.get(connection, sandbox_id).holds_volume

        def find_wish(sandbox: Sandbox) -> Wish:
            if operation is operations.BOOT_AGAIN:
                return Wish()
            spec = sandbox.spec
            return Wish(spec.vcpu_count, spec.memory_mib, spec.disk_mib if fresh else 0, slots=1 if fresh else 0)

        def promise(connection: Connection) -> None:
            self._sandboxes.set_holds_volume(connection, sandbox_id, True)
            self._sandboxes.take_lease(connection, sandbox_id, self._network.slot_count)

        return await self._begin_with_room(operation, sandbox_id, {"fresh": fresh}, find_wish, promise)

    async def _boot_again(self, sandbox_id: str) -> None:
        await self._begin_start(operations.BOOT_AGAIN, sandbox_id)

    async def _stop_idle(self, sandbox_id: str) -> None:
        await self.stop(sandbox_id, reason=StopReason.IDLE)

    def _write_restart(self, connection: Connection, sandbox_id: str) -> None:
        """The second half of a restart, in the transaction that ends the first. Its memory was promised all along."""
        self._transitions.apply(connection, sandbox_id, SandboxState.STARTING)
        self._sandboxes.take_lease(connection, sandbox_id, self._network.slot_count)
        start = operations.START
        self._executor.insert(connection, start.kind, start.saga_id(sandbox_id), sandbox_id, {"fresh": False})

    def _go_on(self, sandbox_id: str, saga_id: str) -> None:
        with log_context(sandbox_id=sandbox_id):
            self._executor.start(saga_id)
            self._background.spawn(self._supervise(sandbox_id, saga_id), f"supervise {saga_id}")

    async def _supervise(self, sandbox_id: str, saga_id: str) -> None:
        """Wait for a saga's end; run the one that it has left behind, and watch the machine if there is one now."""
        record = await self._executor.wait(saga_id)
        if record is not None and has_booted(record):
            self.templates.want(self._get(sandbox_id))
        with self._database.read() as connection:
            following = [each for each in list_open_sagas_of(connection, sandbox_id) if not each.is_stuck]
        for record in following:
            if not self._executor.is_under_way(record.id):
                self._go_on(sandbox_id, record.id)
        self._machines.watch(sandbox_id)

    async def _drop_after(self, saga_id: str) -> None:
        await self._executor.wait(saga_id)
        await self.snapshots.drop_unneeded()

    def _get(self, sandbox_id: str) -> Sandbox:
        with self._database.read() as connection:
            return self._sandboxes.get(connection, sandbox_id)

    def _ids(self, *states: SandboxState) -> list[str]:
        with self._database.read() as connection:
            return self._sandboxes.list_ids(connection, states)
