"""The door to a sandbox's life: begin to create it, wait, destroy it, watch its VMM, recover after a start.

Called by ``services/sandboxes.py`` and the manager's program. Work goes on in the background, in the saga executor's
tasks and one watcher per running sandbox; a caller that goes away stops nothing. Nothing here knows a concrete driver.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from atelier.db.engine import Connection, Database
from atelier.db.outbox import Outbox
from atelier.db.sagas import SagaStore
from atelier.db.sandboxes import GuestSecrets, SandboxRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle.admission import Capacity, check_admission
from atelier.lifecycle.boot_gate import BootGate
from atelier.lifecycle.consoles import KeptConsoles
from atelier.lifecycle.errors import describe_error, is_transient
from atelier.lifecycle.saga_values import process_from_json
from atelier.lifecycle.sandbox_create import KIND, SandboxCreation, create_saga_id
from atelier.lifecycle.transitions import Failure, Transitions, sandbox_topic
from atelier.model.errors import AtelierError, HostError, NotFoundError
from atelier.model.ids import new_sandbox_id
from atelier.model.layout import DataLayout, RunLayout
from atelier.model.machine import ProcessIdentity
from atelier.model.sandbox import Sandbox, SandboxSpec
from atelier.model.states import SandboxState
from atelier.saga.executor import Executor
from atelier.saga.log import SagaGoneError, SagaStatus
from atelier.saga.retry import RetryPolicies
from atelier.telemetry.logs import log_context

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

_UNDER_WAY = frozenset(
    {
        SandboxState.CREATING,
        SandboxState.STARTING,
        SandboxState.STOPPING,
        SandboxState.PAUSING,
        SandboxState.RESUMING,
        SandboxState.DESTROYING,
    }
)
_AT_ONCE = 16
"""Sandboxes that recovery and ``destroy_all`` work on at the same time."""
_WATCH_AGAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LifecycleLimits:
    """``concurrent_boots`` None: as many at once as are asked for. ``console_bytes`` bounds a running sandbox's console
    file."""

    guest_ready_seconds: float = 60.0
    concurrent_boots: int | None = None
    console_bytes: int = 1024 * 1024


class SandboxLifecycle:
    """``capacity`` is what this host has for sandboxes; ``host_id`` stands in their rows, and is the installation's id
    where nothing else is said."""

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
        capacity: Capacity | None = None,
        limits: LifecycleLimits | None = None,
        policies: RetryPolicies | None = None,
    ) -> None:
        self._database = database
        self._vmm = vmm
        self._guests = guests
        self._run = run
        self._host_id = host_id or installation_id
        self._capacity = capacity or Capacity()
        self._limits = limits or LifecycleLimits()
        self._sandboxes = SandboxRepository()
        outbox = Outbox(database)
        self._transitions = Transitions(self._sandboxes, outbox)
        self._consoles = KeptConsoles(data.consoles, run, vmm)
        creation = SandboxCreation(
            database=database,
            sandboxes=self._sandboxes,
            outbox=outbox,
            transitions=self._transitions,
            vmm=vmm,
            storage=storage,
            network=network,
            images=images,
            guests=guests,
            run=run,
            consoles=self._consoles,
            gate=BootGate(self._limits.concurrent_boots),
            installation_id=installation_id,
            guest_ready_seconds=self._limits.guest_ready_seconds,
        )
        self._executor = Executor[Connection](
            SagaStore(database),
            [creation.definition()],
            is_transient=is_transient,
            describe=describe_error,
            policies=policies,
        )
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start_create(self, name: str, spec: SandboxSpec) -> Sandbox:
        """Write the row and the saga in one transaction, begin, and return the row in state ``creating``.

        Raises ConflictError (``name_taken``), CapacityError.
        """
        now = datetime.now(UTC)
        sandbox = Sandbox(
            id=new_sandbox_id(),
            name=name,
            host_id=self._host_id,
            state=SandboxState.CREATING,
            spec=spec,
            created_at=now,
            updated_at=now,
        )
        own = GuestSecrets(token=secrets.token_hex(32), machine_id=secrets.token_hex(16))
        saga_id = create_saga_id(sandbox.id)

        def insert(connection: Connection) -> None:
            usage = self._sandboxes.sum_usage(connection, self._host_id)
            check_admission(self._capacity, usage, spec)
            self._transitions.begin(connection, sandbox, own)
            self._executor.insert(connection, KIND, saga_id, sandbox.id)

        async def begin() -> None:
            await self._database.write(insert)
            with log_context(sandbox_id=sandbox.id):
                self._executor.start(saga_id)
                self._spawn(self._supervise(sandbox.id), f"supervise {sandbox.id}")

        await self._unless_interrupted(begin())
        return sandbox

    async def wait_settled(self, sandbox_id: str, timeout_seconds: float) -> Sandbox | None:
        """The row once nothing is under way with the sandbox (or what is under way is stuck: ``failure_code``); None
        after ``timeout_seconds``. Raises NotFoundError when it is gone."""
        with self._database.subscribe(sandbox_topic(sandbox_id)) as news:
            limit = asyncio.timeout(timeout_seconds)
            try:
                async with limit:
                    while True:
                        news.clear()
                        sandbox = self._get(sandbox_id)
                        if sandbox.state not in _UNDER_WAY or sandbox.failure_code:
                            return sandbox
                        await news.wait()
            except TimeoutError:
                return None

    async def destroy(self, sandbox_id: str, *, wait: bool = True) -> None:
        """Destroy a sandbox, whatever it is doing: the wish is durable when this has begun to wait. With ``wait``
        returns when nothing is left; twice is once.

        Raises NotFoundError; HostError (``destroy_stuck``) when something cannot be freed, which a later call tries
        again.
        """
        saga_id = create_saga_id(sandbox_id)

        def mark(connection: Connection, record: object) -> None:
            if self._sandboxes.get(connection, sandbox_id).state is SandboxState.DESTROYING:
                self._transitions.restate(connection, sandbox_id, None)
            else:
                self._transitions.apply(connection, sandbox_id, SandboxState.DESTROYING)

        async def request() -> None:
            with log_context(sandbox_id=sandbox_id):
                await self._executor.request_unwind(saga_id, mark)

        try:
            await self._unless_interrupted(request())
        except SagaGoneError:
            raise NotFoundError(
                f"there is no sandbox {sandbox_id!r}",
                code="sandbox_not_found",
                hint="atelier ls shows the ones there are",
            ) from None
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

    async def destroy_all(self) -> list[str]:
        """Destroy every sandbox; returns the names of those that are gone. What is stuck is logged and stays."""
        places = asyncio.Semaphore(_AT_ONCE)
        destroyed: list[str] = []
        tried: set[str] = set()

        async def one(sandbox_id: str) -> None:
            async with places:
                try:
                    name = self._get(sandbox_id).name
                    await self.destroy(sandbox_id)
                except NotFoundError:
                    return
                except AtelierError as error:
                    _logger.error("%s", error)
                    return
            destroyed.append(name)

        while remaining := [each for each in self._ids() if each not in tried]:
            tried.update(remaining)
            await asyncio.gather(*(one(sandbox_id) for sandbox_id in remaining))
        return sorted(destroyed)

    async def console(self, sandbox: Sandbox, limit_bytes: int) -> bytes:
        """The newest bytes of the serial console, as the guest wrote them; of a failed sandbox those that were kept."""
        if sandbox.state is SandboxState.FAILED and (kept := await self._consoles.read(sandbox.id, limit_bytes)):
            return kept
        return await self._vmm.console_tail(self._run.vmm_directory(sandbox.id), limit_bytes)

    async def trim_consoles(self) -> None:
        """Bound the consoles of the machines that run. The body of a background loop."""
        for sandbox_id in self._ids(SandboxState.CREATING, SandboxState.RUNNING):
            try:
                await self._vmm.trim_console(self._run.vmm_directory(sandbox_id), self._limits.console_bytes)
            except AtelierError as error:
                _logger.warning("the console of %s cannot be trimmed: %s", sandbox_id, error)

    async def resume_after_full_disk(self) -> None:
        """Let machines go on that the host's full disk has halted. The body of a background loop."""
        for sandbox_id in self._ids(SandboxState.CREATING, SandboxState.RUNNING):
            try:
                if await self._vmm.resume_after_full_disk(self._run.vmm_directory(sandbox_id)):
                    _logger.warning("sandbox %s was halted: no space left on this host for its disk", sandbox_id)
            except AtelierError as error:
                _logger.debug("the machine of %s cannot be asked for its state: %s", sandbox_id, error)

    async def recover(self) -> None:
        """After a start: take up what the last process left half-way (it goes on in the background), and find the
        machines that still run. One whose machine is gone becomes ``failed``."""
        for record in await self._executor.recover():
            _logger.info("found %s of %s %s", record.kind, record.subject_id, record.status)
            self._spawn(self._supervise(record.subject_id), f"supervise {record.subject_id}")
        places = asyncio.Semaphore(_AT_ONCE)

        async def adopt(sandbox_id: str) -> None:
            async with places:
                with log_context(sandbox_id=sandbox_id):
                    await self._adopt(sandbox_id)

        await asyncio.gather(*(adopt(sandbox_id) for sandbox_id in self._ids(SandboxState.RUNNING)))

    async def close(self) -> None:
        """Stop watching and stop sagas where they are; machines go on. The next start takes up what is open."""
        await self._executor.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _supervise(self, sandbox_id: str) -> None:
        """Wait for the creation's end; if the sandbox runs then, watch its machine."""
        record = await self._executor.wait(create_saga_id(sandbox_id))
        if record is None or record.status is not SagaStatus.COMPLETED:
            return
        identity = process_from_json(record.outputs["vmm"])
        del record  # kilobytes, for as long as the machine runs
        await self._watch(sandbox_id, identity)

    async def _watch(self, sandbox_id: str, identity: ProcessIdentity) -> None:
        while True:
            try:
                await self._vmm.wait_ended(identity)
                break
            except AtelierError as error:
                _logger.warning("the machine of %s cannot be watched: %s", sandbox_id, error)
            await asyncio.sleep(_WATCH_AGAIN_SECONDS)
        await self._lose(sandbox_id, "its virtual machine ended by itself")

    async def _lose(self, sandbox_id: str, message: str) -> None:
        """The machine of a running sandbox is gone: say so, unless somebody ended it on purpose. Its volume stays."""
        if self._state(sandbox_id) is not SandboxState.RUNNING:
            return
        tail = await self._consoles.keep(sandbox_id)
        hint = "the end of its console may say why; its disk is kept until it is removed"
        failure = Failure("vmm_ended", message, hint, tail)

        def fail(connection: Connection) -> None:
            sandbox = self._sandboxes.find(connection, sandbox_id)
            if sandbox is not None and sandbox.state is SandboxState.RUNNING:
                self._transitions.apply(connection, sandbox_id, SandboxState.FAILED, failure)
                self._sandboxes.set_vmm_process(connection, sandbox_id, None)

        await self._database.write(fail)
        _logger.warning("sandbox %s failed: %s", sandbox_id, message)

    async def _adopt(self, sandbox_id: str) -> None:
        """Take a machine that outlived the last manager under watch again."""
        directory = self._run.vmm_directory(sandbox_id)
        try:
            identity = await self._vmm.find_process(sandbox_id, directory)
            if identity is None:
                await self._lose(sandbox_id, "its virtual machine was gone when the manager started")
                return
            with self._database.read() as connection:
                token = self._sandboxes.get_secrets(connection, sandbox_id).token
            await self._guests.ensure_channel(sandbox_id, self._vmm.guest_endpoint(directory), token)
        except AtelierError as error:
            # The machine, if there is one, is left alone: the gateway may hold its channel still, a person can destroy.
            _logger.error("sandbox %s could not be taken up: %s", sandbox_id, error)
            return

        def note(connection: Connection) -> None:
            self._sandboxes.set_vmm_process(connection, sandbox_id, identity)

        await self._database.write(note)
        self._spawn(self._watch(sandbox_id, identity), f"watch {sandbox_id}")

    def _get(self, sandbox_id: str) -> Sandbox:
        with self._database.read() as connection:
            return self._sandboxes.get(connection, sandbox_id)

    def _state(self, sandbox_id: str) -> SandboxState | None:
        with self._database.read() as connection:
            sandbox = self._sandboxes.find(connection, sandbox_id)
        return None if sandbox is None else sandbox.state

    def _ids(self, *states: SandboxState) -> list[str]:
        with self._database.read() as connection:
            return self._sandboxes.list_ids(connection, states)

    async def _unless_interrupted(self, work: Coroutine[Any, Any, _T]) -> _T:
        """``work`` goes on to its end also when its caller is cancelled: what is written must be begun, too."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception:
                _logger.exception("%s ended unexpectedly", name)

        task = asyncio.create_task(guarded(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
