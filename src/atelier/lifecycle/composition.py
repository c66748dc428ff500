"""Puts the parts of the lifecycle together: what writes rows, the steps over the drivers, the sagas made of them, and the
executor that runs these. Called by ``sandboxes`` alone, which is the door to all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from atelier.db.engine import Connection, Database
from atelier.db.outbox import Outbox
from atelier.db.sagas import SagaStore
from atelier.db.sandbox_machines import SandboxMachineRepository
from atelier.db.sandboxes import SandboxRepository
from atelier.db.snapshots import SnapshotRepository
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.lifecycle import snapshot_bake
from atelier.lifecycle.background import BackgroundTasks
from atelier.lifecycle.boot_gate import BootGate
from atelier.lifecycle.consoles import KeptConsoles
from atelier.lifecycle.errors import describe_error, is_transient
from atelier.lifecycle.memory_steps import MemorySteps
from atelier.lifecycle.network_policies import NetworkPolicies
from atelier.lifecycle.origins import Origins
from atelier.lifecycle.sandbox_claim import define_claim
from atelier.lifecycle.sandbox_create import define_create
from atelier.lifecycle.sandbox_pause import define_pause
from atelier.lifecycle.sandbox_resize import define_resize
from atelier.lifecycle.sandbox_resume import define_resume
from atelier.lifecycle.sandbox_start import define_start
from atelier.lifecycle.sandbox_steps import SandboxSteps
from atelier.lifecycle.sandbox_stop import define_stop
from atelier.lifecycle.saved_memories import SavedMemories
from atelier.lifecycle.shared_templates import SharedTemplates
from atelier.lifecycle.snapshot_adopt import AdoptSteps, define_adopt
from atelier.lifecycle.snapshot_bake import BakeSteps, bake_saga_id, define_bake
from atelier.lifecycle.snapshot_checks import SnapshotChecks
from atelier.lifecycle.snapshot_files import SnapshotFiles
from atelier.lifecycle.snapshot_rows import SnapshotRows
from atelier.lifecycle.snapshot_take import TakeSteps, define_take
from atelier.lifecycle.snapshots import Snapshots
from atelier.lifecycle.template_cache import TemplateCache
from atelier.lifecycle.transitions import Transitions
from atelier.model.image import Image
from atelier.model.layout import CacheLayout, DataLayout, RunLayout
from atelier.model.machine import BootFiles, MachineStamp
from atelier.saga.definition import SagaDefinition
from atelier.saga.executor import Executor
from atelier.saga.retry import RetryPolicies


@dataclass(frozen=True, slots=True)
class LifecycleLimits:
    """``concurrent_boots`` None: as many at once as are asked for. ``stop_grace_seconds``: how long a guest may take to shut
    down, where the caller says nothing. ``uses_templates``: creates are restored from templates where there are any.
    ``template_cache``: where these are shared with other installations; None: with none."""

    guest_ready_seconds: float = 60.0
    stop_grace_seconds: float = 30.0
    concurrent_boots: int | None = None
    uses_templates: bool = False
    template_cache: CacheLayout | None = None


@dataclass(frozen=True, slots=True)
class HostDrivers:
    """What the host is driven by, one of each kind."""

    vmm: VmmDriver
    storage: StorageDriver
    network: NetworkDriver
    images: ImageDriver
    guests: GuestDriver


@dataclass(frozen=True, slots=True)
class Composition:
    sandboxes: SandboxRepository
    transitions: Transitions
    consoles: KeptConsoles
    background: BackgroundTasks
    network_policies: NetworkPolicies
    origins: Origins
    checks: SnapshotChecks
    snapshots: Snapshots
    shared_templates: SharedTemplates
    sagas: tuple[SagaDefinition[Connection], ...]
    executor: Executor[Connection]


def compose(
    *,
    database: Database,
    drivers: HostDrivers,
    data: DataLayout,
    run: RunLayout,
    installation_id: str,
    limits: LifecycleLimits,
    policies: RetryPolicies | None,
    now: Callable[[], datetime],
    begin_start: Callable[[Connection, str], None],
) -> Composition:
    """``begin_start(connection, sandbox_id)`` writes state and saga of a start into the transaction that ends a stop."""
    outbox = Outbox(database)
    sandboxes = SandboxRepository()
    machines = SandboxMachineRepository()
    transitions = Transitions(sandboxes, outbox, now)
    consoles = KeptConsoles(data.consoles, run, drivers.vmm)
    memories = SavedMemories(data)
    background = BackgroundTasks()
    network_policies = NetworkPolicies(database, drivers.network, background)
    rows = SnapshotRows(SnapshotRepository(), outbox, now)
    files = SnapshotFiles(data)
    checks = SnapshotChecks(database, rows, files, drivers.storage, drivers.vmm, drivers.network)

    async def adopt(
        key: str, host_id: str, image: Image, boot: BootFiles, stamp: MachineStamp, *, is_awaited: bool
    ) -> bool:
        return await shared_templates.adopt(key, host_id, image, boot, stamp, is_awaited=is_awaited)

    origins = Origins(
        database, drivers.images, drivers.storage, drivers.network, drivers.vmm, checks, adopt, limits.uses_templates
    )
    steps = SandboxSteps(
        database=database,
        sandboxes=sandboxes,
        outbox=outbox,
        transitions=transitions,
        vmm=drivers.vmm,
        storage=drivers.storage,
        network=drivers.network,
        network_policies=network_policies,
        images=drivers.images,
        guests=drivers.guests,
        run=run,
        consoles=consoles,
        memories=memories,
        origins=origins,
        gate=BootGate(limits.concurrent_boots),
        installation_id=installation_id,
        guest_ready_seconds=limits.guest_ready_seconds,
        stop_grace_seconds=limits.stop_grace_seconds,
    )
    memory_steps = MemorySteps(steps, machines)

    def begin_bake(connection: Connection, snapshot_id: str) -> None:
        executor.insert(connection, snapshot_bake.KIND, bake_saga_id(snapshot_id), snapshot_id)

    create = define_create(steps)
    bake = BakeSteps(rows, files, drivers.storage, drivers.vmm, run, installation_id, database)
    sagas = (
        create,
        define_claim(steps, create.steps),
        define_start(steps),
        define_stop(steps, begin_start),
        define_resize(steps),
        define_pause(memory_steps),
        define_resume(memory_steps),
        define_take(TakeSteps(steps, rows, files, machines), begin_bake),
        define_bake(bake),
        define_adopt(AdoptSteps(bake)),
    )
    executor = Executor[Connection](
        SagaStore(database), sagas, is_transient=is_transient, describe=describe_error, policies=policies
    )
    snapshots = Snapshots(database=database, executor=executor, background=background, rows=rows, now=now)
    shared_templates = SharedTemplates(
        cache=TemplateCache(limits.template_cache) if limits.template_cache else None,
        database=database,
        executor=executor,
        background=background,
        rows=rows,
        files=files,
        snapshots=snapshots,
        storage=drivers.storage,
        images=drivers.images,
        now=now,
    )
    return Composition(
        sandboxes=sandboxes,
        transitions=transitions,
        consoles=consoles,
        background=background,
        network_policies=network_policies,
        origins=origins,
        checks=checks,
        snapshots=snapshots,
        shared_templates=shared_templates,
        sagas=sagas,
        executor=executor,
    )
