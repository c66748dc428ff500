"""Snapshots: what is asked for and what is answered."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field, StrictInt

from atelier.model.snapshot import SnapshotPurpose, SnapshotState
from atelier.schemas.errors import ErrorBody
from atelier.schemas.request_body import RequestBody
from atelier.schemas.sandboxes import LabelKey, LabelValue


class TakeSnapshotRequest(RequestBody):
    """``name``: a DNS label of at most 40 characters, unique among snapshots; generated if absent. ``keep_last``: once it
    is ready, older ones of this sandbox are deleted until so many are left; what something needs stays."""

    name: str | None = None
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict[str, str], max_length=64)
    keep_last: StrictInt | None = Field(None, ge=1, le=1000)


class Snapshot(BaseModel):
    """A snapshot as the API shows it. ``sandbox_id`` and ``sandbox_name``: what it was taken of, which may be gone.
    ``parent_id``: the snapshot before it, in the tree of them. ``memory_bytes`` and ``disk_bytes``: what is really
    occupied on disk, 0 until it is ready; ``stopped_ms``: how long the sandbox stood still for it. ``failure`` is set in
    the states ``failed`` and ``damaged``, and in ``deleting`` when that is stuck."""

    id: str
    name: str
    state: SnapshotState
    purpose: SnapshotPurpose
    sandbox_id: str
    sandbox_name: str
    parent_id: str | None = None
    image: str
    image_id: str
    vcpu_count: int
    memory_mib: int
    disk_mib: int
    memory_bytes: int
    disk_bytes: int
    stopped_ms: float
    labels: dict[str, str]
    keep_last: int | None = None
    created_at: datetime
    updated_at: datetime
    failure: ErrorBody | None = None


class SnapshotPage(BaseModel):
    """Oldest first: parents stand before their children. ``next_cursor`` is absent on the last page."""

    items: list[Snapshot]
    next_cursor: str | None = None
