"""What a snapshot is: a machine as it stood at one moment, memory and disk, from which any number of sandboxes begin."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from atelier.model.saved_machine import MachineRecord


class SnapshotState(StrEnum):
    """``taking``: the sandbox is being saved; ``baking``: its disk and memory are made fit to be shared, while it goes on;
    ``ready``: sandboxes can be created from it; ``damaged``: a file of it is not what was written, it serves nobody."""

    TAKING = "taking"
    BAKING = "baking"
    READY = "ready"
    DAMAGED = "damaged"
    FAILED = "failed"
    DELETING = "deleting"


class SnapshotPurpose(StrEnum):
    """Who wanted it. ``fork``: made for forks, and gone with the last of them; ``template``: made by Atelier itself from
    a fresh guest, so that creates are fast."""

    USER = "user"
    FORK = "fork"
    TEMPLATE = "template"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One row of the table ``snapshots``. ``sandbox_id`` and ``sandbox_name`` are those of the sandbox that it was taken
    of, which may be gone; ``parent_id`` is the snapshot from which that sandbox began, or its own latest one, and ``base_id``
    always the first: the one over whose disk this one's stands. ``keep_last``: how many of the sandbox's snapshots, this
    one included, are kept once it is ready; None: all.
    ``memory_bytes`` and ``disk_bytes`` are what is really occupied on disk; 0 until it is ready. ``template_key``: what a
    template fits; empty for others. ``owner_id``: whose sandbox it was taken of; empty for Atelier's own."""

    id: str
    name: str
    host_id: str
    state: SnapshotState
    purpose: SnapshotPurpose
    sandbox_id: str
    sandbox_name: str
    image: str
    image_id: str
    vcpu_count: int
    memory_mib: int
    disk_mib: int
    file_system_mib: int
    machine: MachineRecord
    created_at: datetime
    updated_at: datetime
    parent_id: str | None = None
    base_id: str | None = None
    keep_last: int | None = None
    labels: dict[str, str] = field(default_factory=dict[str, str])
    environment: dict[str, str] = field(default_factory=dict[str, str])
    template_key: str = ""
    memory_bytes: int = 0
    disk_bytes: int = 0
    checksums: dict[str, str] = field(default_factory=dict[str, str])
    boot_id: str = ""
    stopped_ms: float = 0.0
    failure_code: str = ""
    failure_message: str = ""
    failure_hint: str = ""
    owner_id: str = ""
