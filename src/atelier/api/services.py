"""The services that routes call, in one value; made by ``manager.wiring``, kept in the application's state."""

from __future__ import annotations

from dataclasses import dataclass

from atelier.drivers.images.interface import WebFiles
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
from atelier.services.previews import PreviewService
from atelier.services.rate_limits import RateLimits
from atelier.services.sandboxes import SandboxService
from atelier.services.sign_in import SignInService
from atelier.services.snapshots import SnapshotService
from atelier.services.ssh_keys import SshEntry, SshKeyService
from atelier.services.warm_pools import WarmPoolService


@dataclass(frozen=True, slots=True)
class Services:
    sandboxes: SandboxService
    snapshots: SnapshotService
    warm_pools: WarmPoolService
    networks: NetworkService
    sessions: GuestSessions
    images: ImageService
    events: EventService
    host: HostService
    authenticator: Authenticator
    accounts: AccountService
    access: AccessService
    sign_in: SignInService
    ssh_keys: SshKeyService
    ssh_entry: SshEntry
    previews: PreviewService
    preview_entry: PreviewEntry
    audit: AuditLog
    idempotency: IdempotencyService
    rate_limits: RateLimits
    web_files: WebFiles
    health: Health
    """What ``/health`` says: it stays the same for as long as the manager runs."""
