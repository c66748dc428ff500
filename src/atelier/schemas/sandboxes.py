"""Sandboxes: what is asked for and what is answered."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, Field, StrictBool, StrictFloat, StrictInt, StringConstraints

from atelier.model.ids import NAME_MAX_LENGTH
from atelier.model.sandbox import (
    DEFAULT_DISK_MIB,
    DEFAULT_IMAGE,
    DEFAULT_MEMORY_MIB,
    DEFAULT_VCPU_COUNT,
    MAX_DISK_MIB,
    MAX_FORK_COUNT,
    MAX_MEMORY_MIB,
    MAX_VCPU_COUNT,
    MIN_DISK_MIB,
    MIN_MEMORY_MIB,
    MIN_VCPU_COUNT,
)
from atelier.model.states import SandboxState, StopReason
from atelier.schemas.errors import ErrorBody
from atelier.schemas.networks import NetworkPolicy
from atelier.schemas.request_body import RequestBody

EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
EnvironmentValue = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]
LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=63)]
IdleSeconds = Annotated[StrictInt, Field(ge=10, le=365 * 86400)]
LabelValue = Annotated[str, StringConstraints(max_length=255)]


class CreateSandboxRequest(RequestBody):
    """``name``: a DNS label of at most 40 characters, unique; generated if absent. ``network``: if absent, the internet,
    and nothing else. ``snapshot``: id or name of one to go on from; image, vCPUs and memory are then the snapshot's, its
    disk's size the least, and its environment stands below this one. ``disk_only``: boot from the snapshot's disk, and
    leave its memory."""

    name: str | None = None
    image: Annotated[str, StringConstraints(min_length=1, max_length=100)] = DEFAULT_IMAGE
    vcpu_count: StrictInt = Field(DEFAULT_VCPU_COUNT, ge=MIN_VCPU_COUNT, le=MAX_VCPU_COUNT)
    memory_mib: StrictInt = Field(DEFAULT_MEMORY_MIB, ge=MIN_MEMORY_MIB, le=MAX_MEMORY_MIB)
    disk_mib: StrictInt = Field(DEFAULT_DISK_MIB, ge=MIN_DISK_MIB, le=MAX_DISK_MIB)
    environment: dict[EnvironmentName, EnvironmentValue] = Field(default_factory=dict[str, str], max_length=200)
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict[str, str], max_length=64)
    auto_stop_after_idle_seconds: IdleSeconds | None = None
    expires_at: AwareDatetime | None = None
    network: NetworkPolicy | None = None
    snapshot: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    disk_only: StrictBool = False


class ForkRequest(RequestBody):
    """``count`` sandboxes, named ``<name_prefix>-1`` and so on (absent: after the one that is forked; numbers that are
    taken are passed over). ``labels``: beside those of the one that is forked."""

    count: StrictInt = Field(1, ge=1, le=MAX_FORK_COUNT)
    name_prefix: Annotated[str, StringConstraints(min_length=1, max_length=NAME_MAX_LENGTH)] | None = None
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict[str, str], max_length=64)


class ChangeSandboxRequest(RequestBody):
    """A field that is absent stays as it is; ``null`` takes a limit away. ``expires_at``: destroyed then;
    ``auto_stop_after_idle_seconds``: stopped when nobody has used it for so long."""

    auto_stop_after_idle_seconds: IdleSeconds | None = None
    expires_at: AwareDatetime | None = None


class StopRequest(RequestBody):
    """``grace_seconds``: how long the guest may take to shut down before it is cut off; absent: half a minute."""

    grace_seconds: StrictFloat | None = Field(None, ge=0, le=3600)


class ResumeRequest(RequestBody):
    """``from_disk``: boot it from its disk, and give its memory up."""

    from_disk: StrictBool = False


class ResizeRequest(RequestBody):
    disk_mib: StrictInt = Field(ge=MIN_DISK_MIB, le=MAX_DISK_MIB)


class Sandbox(BaseModel):
    """A sandbox as the API shows it. ``failure`` is set in state ``failed``, in any state when what is under way is
    stuck, and in ``running`` or ``paused`` when it could not be paused or resumed; ``stop_reason`` in state ``stopped``.
    ``last_active_at`` lags behind by up to a minute. ``snapshot_id``: the snapshot that it began from."""

    id: str
    name: str
    state: SandboxState
    image: str
    image_id: str
    vcpu_count: int
    memory_mib: int
    disk_mib: int
    labels: dict[str, str]
    created_at: datetime
    updated_at: datetime
    stop_reason: StopReason | None = None
    auto_stop_after_idle_seconds: int | None = None
    expires_at: datetime | None = None
    last_active_at: datetime | None = None
    snapshot_id: str | None = None
    failure: ErrorBody | None = None
    console_tail: str | None = None


class SandboxList(BaseModel):
    items: list[Sandbox]


class SandboxPage(BaseModel):
    """``next_cursor`` is absent on the last page."""

    items: list[Sandbox]
    next_cursor: str | None = None


class SandboxMetrics(BaseModel):
    cpu_count: int
    cpu_used_percent: float
    memory_total_bytes: int
    memory_used_bytes: int
    disk_total_bytes: int
    disk_used_bytes: int
    uptime_seconds: float
