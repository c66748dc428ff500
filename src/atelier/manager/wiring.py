"""Chooses the drivers of a mode and puts the manager together: the only file of the manager that names concrete
drivers. A mode is nothing else than what stands here; no other file asks which one it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import atelier
from atelier.api.services import Services
from atelier.config.production import CompanionChoice, VmmChoice
from atelier.config.settings import (
    Accelerator,
    GuestKernelChoice,
    NetworkChoice,
    NetworkHome,
    ServerMode,
    Settings,
    SignInSettings,
    StorageChoice,
    TemplateChoice,
)
from atelier.db.engine import Database
from atelier.db.installation import Installation
from atelier.drivers.guest.agent import AgentGuests
from atelier.drivers.guest.fake import FakeGuests
from atelier.drivers.guest.interface import GuestDriver
from atelier.drivers.images.debian import DebianImages
from atelier.drivers.images.fake import FakeImages
from atelier.drivers.images.interface import ImageDriver
from atelier.drivers.images.npm_packages import NpmPackages
from atelier.drivers.network.bridge import BridgeNetwork
from atelier.drivers.network.fake import FakeNetwork
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.network.succession import SucceededNetwork
from atelier.drivers.network.user import UserNetwork
from atelier.drivers.sign_in.github import GitHubProvider
from atelier.drivers.sign_in.interface import SignInProvider
from atelier.drivers.sign_in.oidc import OidcProvider
from atelier.drivers.storage.fake import FakeStorage
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.storage.lvm_thin import LvmThinStorage
from atelier.drivers.storage.qcow2 import Qcow2Storage
from atelier.drivers.vmm.asked_jails import AskedJails
from atelier.drivers.vmm.confinement import AskedConfinement
from atelier.drivers.vmm.fake import FakeVmm
from atelier.drivers.vmm.firecracker import FirecrackerVmm
from atelier.drivers.vmm.firecracker_choice import takes_firecracker
from atelier.drivers.vmm.firecracker_config import rate_limiter
from atelier.drivers.vmm.firecracker_launch import MachineChoices
from atelier.drivers.vmm.interface import VmmDriver
from atelier.drivers.vmm.qemu import QemuVmm
from atelier.drivers.vmm.vmm_users import VMM_USERS
from atelier.host.checks.network import check_bridge_network
from atelier.host.memory import memory_bytes
from atelier.host.privilege import Privileges
from atelier.lifecycle.admission import Capacity, RoomPolicy
from atelier.lifecycle.composition import LifecycleLimits
from atelier.lifecycle.fleet import SandboxFleet
from atelier.lifecycle.sandboxes import SandboxLifecycle
from atelier.manager.gateway_process import GatewayProcess
from atelier.manager.network_choice import choose_network
from atelier.manager.network_process import FormerNetworkHolder, NetworkHolderProcess, own_holder
from atelier.model.errors import HostError
from atelier.model.jail import JailPlaces
from atelier.model.layout import CacheLayout, DataLayout, RunLayout
from atelier.schemas.health import Health
from atelier.services.access import AccessService
from atelier.services.accounts import AccountService
from atelier.services.audit import AuditLog
from atelier.services.authentication import Authenticator
from atelier.services.events import EventService
from atelier.services.guest_sessions import GuestSessions
from atelier.services.host import HostService
from atelier.services.idempotency import IdempotencyService
from atelier.services.images import ImageService
from atelier.services.networks import NetworkService
from atelier.services.preview_entry import PreviewEntry
from atelier.services.preview_passes import PreviewPasses
from atelier.services.previews import PreviewService
from atelier.services.rate_limits import Limits, RateLimits
from atelier.services.sandboxes import SandboxService
from atelier.services.sign_in import Admission, SignInService
from atelier.services.snapshots import SnapshotService
from atelier.services.ssh_keys import SshEntry, SshKeyService
from atelier.services.warm_pools import WarmPoolService

logger = logging.getLogger(__name__)

_MEMORY_RESERVE_MIB = 512
"""What the host itself, manager and gateway keep of its memory."""
_DISK_RESERVE_MIB = 512
"""What database, logs and consoles keep of the disk."""
_GUEST_READY_SECONDS = 120.0
"""A boot takes 3 s under emulation on an idle machine; on one that is overloaded it takes its time."""
_MOCK_MEMORY_MIB = 1_000_000


@dataclass(frozen=True, slots=True)
class Drivers:
    """``gateway`` is None where the guest driver needs none, ``network_holder`` where the network driver does.
    ``network_missing``: why sandboxes have no way out although nobody has asked for that; else empty."""

    vmm: VmmDriver
    storage: StorageDriver
    network: NetworkDriver
    images: ImageDriver
    guests: GuestDriver
    gateway: GatewayProcess | None
    network_holder: NetworkHolderProcess | None
    network_missing: str
    room: RoomPolicy
    concurrent_boots: int | None
    uses_templates: bool
    template_cache: CacheLayout | None
    close: Callable[[], Awaitable[None]]


async def choose_drivers(settings: Settings, data: DataLayout, run: RunLayout, ids: Installation) -> Drivers:
    """Raises HostError, MissingProgramError, VmmError for a VMM that was asked for and cannot be had here."""
    match settings.mode:
        case ServerMode.MOCK:
            return _mock_drivers(settings, data)
        case ServerMode.LOCAL:
            accelerator = settings.accelerator.value
            vmm = QemuVmm(
                ids.installation_id,
                cache_dir=settings.cache_dir,
                accelerator=accelerator,
                disk_rate=settings.disk_rate,
            )
            return _real_drivers(vmm, settings, data, run, ids)
        case ServerMode.PRODUCTION:
            return _real_drivers(await _production_vmm(settings, ids), settings, data, run, ids)


def assemble(
    drivers: Drivers,
    database: Database,
    lifecycle: SandboxLifecycle,
    fleet: SandboxFleet,
    settings: Settings,
    preview_key: bytes,
    end_manager: Callable[[], None],
) -> Services:
    """The services that the API calls. ``preview_key``: by which ways into previews are signed."""
    sandboxes = SandboxService(database, drivers.images, lifecycle)
    authenticator = Authenticator(database)
    accounts = AccountService(database, authenticator)
    access, audit = AccessService(database), AuditLog(database)
    ssh_keys = SshKeyService(database, accounts, access)
    passes = PreviewPasses(preview_key)
    previews = PreviewService(database, sandboxes, drivers.guests, passes)
    return Services(
        sandboxes=sandboxes,
        snapshots=SnapshotService(database, lifecycle),
        warm_pools=WarmPoolService(database, drivers.images, lifecycle.warm_pools),
        networks=NetworkService(database, drivers.network, lifecycle.network_policies),
        sessions=GuestSessions(sandboxes.get, sandboxes.wake, drivers.guests, lifecycle.activity),
        images=ImageService(drivers.images),
        events=EventService(database),
        host=HostService(lifecycle.reclaim.orphans, fleet, end_manager),
        authenticator=authenticator,
        accounts=accounts,
        sign_in=SignInService(
            database,
            accounts,
            _sign_in_providers(settings.sign_in),
            Admission(settings.sign_in.emails, settings.sign_in.domains),
        ),
        access=access,
        audit=audit,
        ssh_keys=ssh_keys,
        ssh_entry=SshEntry(ssh_keys, sandboxes, lifecycle.activity, audit),
        previews=previews,
        preview_entry=PreviewEntry(
            database, previews, passes, authenticator, access, sandboxes, lifecycle.activity, audit
        ),
        idempotency=IdempotencyService(database),
        rate_limits=RateLimits(
            Limits(settings.requests_per_second, settings.sign_ins_per_minute, settings.web_sockets_per_key)
        ),
        web_files=NpmPackages(
            settings.recipes_dir / "web" / "packages.json", settings.cache_dir / "packages", settings.npm_registry
        ),
        health=Health(
            status="ok",
            version=atelier.__version__,
            mode=settings.mode,
            network=drivers.network.name,
            network_missing=drivers.network_missing,
        ),
    )


def build_lifecycle(
    drivers: Drivers, database: Database, data: DataLayout, run: RunLayout, ids: Installation
) -> SandboxLifecycle:
    return SandboxLifecycle(
        database=database,
        vmm=drivers.vmm,
        storage=drivers.storage,
        network=drivers.network,
        images=drivers.images,
        guests=drivers.guests,
        data=data,
        run=run,
        installation_id=ids.installation_id,
        host_id=ids.host_id,
        room=drivers.room,
        limits=LifecycleLimits(
            guest_ready_seconds=_GUEST_READY_SECONDS,
            concurrent_boots=drivers.concurrent_boots,
            uses_templates=drivers.uses_templates,
            template_cache=drivers.template_cache,
        ),
    )


def _sign_in_providers(settings: SignInSettings) -> dict[str, SignInProvider]:
    found: list[SignInProvider] = []
    if settings.github_client_id:
        found.append(
            GitHubProvider(
                settings.github_client_id,
                settings.github_client_secret,
                sorted(settings.github_organizations),
                settings.github_url,
            )
        )
    if settings.oidc_issuer:
        found.append(
            OidcProvider(
                settings.oidc_issuer, settings.oidc_client_id, settings.oidc_client_secret, settings.oidc_title
            )
        )
    return {each.name: each for each in found}


async def _production_vmm(settings: Settings, ids: Installation) -> VmmDriver:
    production, privileges = settings.production, Privileges("vmm")
    if await takes_firecracker(production.vmm.value, production.firecracker, production.jailer):
        lacking = firecracker_lacks(settings)
        if not lacking:
            return FirecrackerVmm(
                ids.installation_id,
                AskedJails(privileges, JailPlaces(production.jails_dir, production.firecracker.name)),
                production.firecracker,
                users=VMM_USERS,
                choices=MachineChoices(
                    disk_rate=rate_limiter(
                        settings.disk_rate.bytes_per_second, settings.disk_rate.operations_per_second
                    )
                ),
            )
        if production.vmm is VmmChoice.FIRECRACKER:
            raise HostError(f"Firecracker cannot be used: {lacking}", code="firecracker_unusable", hint=lacking)
        logger.warning("machines are QEMU's, though Firecracker is installed: %s", lacking)
    return QemuVmm(
        ids.installation_id,
        cache_dir=settings.cache_dir,
        # Emulation only for who asks for it: it would be taken for a slow host.
        accelerator="tcg" if settings.accelerator is Accelerator.TCG else "kvm",
        disk_rate=settings.disk_rate,
        confinement=AskedConfinement(privileges),
    )


def firecracker_lacks(settings: Settings) -> str:
    """Which setting keeps it from being used, with what it is to be; empty: none."""
    if settings.storage is not StorageChoice.LVM_THIN:
        return "it takes volumes alone: set storage.kind (ATELIER_STORAGE) to lvm-thin"
    if settings.network is not NetworkChoice.BRIDGE or settings.network_home is not NetworkHome.HOST:
        return "it opens TAPs of the host: set network.kind (ATELIER_NETWORK) to bridge and network.home to host"
    return ""


def _real_drivers(vmm: VmmDriver, settings: Settings, data: DataLayout, run: RunLayout, ids: Installation) -> Drivers:
    package = Path(__file__).resolve().parents[1]
    guests = AgentGuests(run.channel_socket, run.gateway_socket)
    chosen = choose_network(settings.network)
    network, holder = _local_network(chosen.bridged, settings, data, run, ids)
    return Drivers(
        vmm=vmm,
        storage=_storage(settings, data),
        network=network,
        images=DebianImages(
            settings.cache_dir,
            settings.recipes_dir,
            package,
            # Firecracker's guests are reached by vsock, which is a module of Debian's that nobody loads.
            own_kernel=settings.guest_kernel is GuestKernelChoice.OWN or isinstance(vmm, FirecrackerVmm),
        ),
        guests=guests,
        gateway=GatewayProcess(
            run.root, run.gateway_socket, data.logs / "gateway.log", service=_service(settings, "gateway")
        ),
        network_holder=holder,
        network_missing=chosen.missing,
        # More at once than there are processors only makes each of them late.
        concurrent_boots=max(2, os.cpu_count() or 1),
        uses_templates=settings.templates is TemplateChoice.ON,
        template_cache=CacheLayout(settings.cache_dir),
        room=RoomPolicy(
            memory_available_bytes=lambda: memory_bytes("MemAvailable"),
            memory_reserve_mib=_MEMORY_RESERVE_MIB,
            disk_overcommit=settings.disk_overcommit,
            disk_reserve_mib=_DISK_RESERVE_MIB,
        ),
        close=guests.close,
    )


def _storage(settings: Settings, data: DataLayout) -> StorageDriver:
    match settings.storage:
        case StorageChoice.QCOW2:
            return Qcow2Storage(data.volumes)
        case StorageChoice.LVM_THIN:
            return LvmThinStorage(Privileges("storage"))


def _local_network(
    bridged: bool, settings: Settings, data: DataLayout, run: RunLayout, ids: Installation
) -> tuple[NetworkDriver, NetworkHolderProcess | None]:
    service = _service(settings, "network")
    bridge = BridgeNetwork(run.network_socket)
    starter = own_holder(
        data, run, ids.installation_id, home=settings.network_home.value, bridge_name=settings.bridge_name
    )
    if bridged:
        log = data.logs / "network.log"
        # What a service needs of the machine is not what this user would need.
        check = list if service else check_bridge_network
        return bridge, NetworkHolderProcess(starter, run.network_socket, log, check, service)
    if run.network_lock.exists():
        # Sandboxes were started on a bridge, and may run still.
        former = FormerNetworkHolder(starter, run.network_socket, data.logs / "network.log", list)
        return SucceededNetwork(UserNetwork(), bridge), former
    return UserNetwork(), None


def _service(settings: Settings, name: str) -> str:
    """The host's service that a companion is; empty: the manager keeps it itself."""
    return f"atelier-{name}" if settings.production.companions is CompanionChoice.SERVICES else ""


def _mock_drivers(settings: Settings, data: DataLayout) -> Drivers:
    guests = FakeGuests()
    vmm = FakeVmm(guest_memory=guests)
    guests.on_shut_down = vmm.end_machine
    return Drivers(
        vmm=vmm,
        storage=FakeStorage(folder=data.volumes),
        network=FakeNetwork(),
        images=FakeImages(folder=settings.cache_dir / "fake"),
        guests=guests,
        gateway=None,
        network_holder=None,
        network_missing="",
        concurrent_boots=None,
        uses_templates=False,
        template_cache=None,
        room=RoomPolicy(fixed=Capacity(memory_mib=_MOCK_MEMORY_MIB)),
        close=guests.close,
    )
