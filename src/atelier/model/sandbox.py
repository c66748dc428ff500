"""What a sandbox is, and how big it may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from atelier.model.states import SandboxState

DEFAULT_VCPU_COUNT = 1
DEFAULT_MEMORY_MIB = 512
DEFAULT_DISK_MIB = 4096
DEFAULT_IMAGE = "base"

MIN_VCPU_COUNT, MAX_VCPU_COUNT = 1, 32
MIN_MEMORY_MIB, MAX_MEMORY_MIB = 128, 1024 * 1024
MIN_DISK_MIB, MAX_DISK_MIB = 512, 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What the creator asked for. ``image`` is the image's name (``base``); ``image_id`` the exact build it resolved to."""

    image: str = DEFAULT_IMAGE
    image_id: str = ""
    vcpu_count: int = DEFAULT_VCPU_COUNT
    memory_mib: int = DEFAULT_MEMORY_MIB
    disk_mib: int = DEFAULT_DISK_MIB
    environment: dict[str, str] = field(default_factory=dict[str, str])
    labels: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One row of the table ``sandboxes``. ``failure_*`` are set in state ``failed``, and in ``destroying`` when that is
    stuck."""

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
