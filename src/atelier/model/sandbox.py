"""What a sandbox is, and how big it may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from atelier.model.states import SandboxState, StopReason

DEFAULT_VCPU_COUNT = 1
DEFAULT_MEMORY_MIB = 512
DEFAULT_DISK_MIB = 4096
DEFAULT_IMAGE = "base"

MIN_VCPU_COUNT, MAX_VCPU_COUNT = 1, 32
MIN_MEMORY_MIB, MAX_MEMORY_MIB = 128, 1024 * 1024
MIN_DISK_MIB, MAX_DISK_MIB = 512, 16 * 1024 * 1024

MAX_FORK_COUNT = 10_000
"""Beyond what any host holds, which says by itself what would fit."""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What the creator asked for. ``image`` is the image's name (``base``); ``image_id`` the exact build it resolved to.

    ``auto_stop_after_idle_seconds``: stopped when nobody has used it for so long; ``expires_at``: destroyed then.
    None: never. ``owner_id``: the user whose it is; empty for Atelier's own.
    """

    image: str = DEFAULT_IMAGE
    image_id: str = ""
    vcpu_count: int = DEFAULT_VCPU_COUNT
    memory_mib: int = DEFAULT_MEMORY_MIB
    disk_mib: int = DEFAULT_DISK_MIB
    environment: dict[str, str] = field(default_factory=dict[str, str])
    labels: dict[str, str] = field(default_factory=dict[str, str])
    auto_stop_after_idle_seconds: int | None = None
    expires_at: datetime | None = None
    owner_id: str = ""


class SandboxPurpose(StrEnum):
    """Whose it is. ``template``: Atelier's own, to make a template of; ``pool``: waits to be taken. Both are in nobody's
    list."""

    USER = "user"
    TEMPLATE = "template"
    POOL = "pool"


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One row of the table ``sandboxes``. ``failure_*`` are set in state ``failed``, and in any state when what is under
    way is stuck. ``holds_volume``: it has a disk, or is about to. ``file_system_mib``: what the guest's root file system
    was grown to; 0: never. ``last_active_at``: the last use that was written down; None: it has never run.
    ``snapshot_id``: the snapshot that its machine was restored from when it was created and its disk stands over; None:
    its image, or a template. ``disk_only``: it took the snapshot's disk alone, and booted."""

    id: str
    name: str
    host_id: str
    state: SandboxState
    spec: SandboxSpec
    created_at: datetime
    updated_at: datetime
    failure_code: str = ""
    failure_message: str = ""
    failure_hint: str = ""
    console_tail: str = ""
    stop_reason: StopReason | None = None
    holds_volume: bool = True
    file_system_mib: int = 0
    last_active_at: datetime | None = None
    snapshot_id: str | None = None
    disk_only: bool = False
    purpose: SandboxPurpose = SandboxPurpose.USER
