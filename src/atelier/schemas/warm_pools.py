"""Warm pools: what is asked for and what is answered."""

from __future__ import annotations

from pydantic import BaseModel, Field, StrictInt

from atelier.model.sandbox import (
    DEFAULT_MEMORY_MIB,
    DEFAULT_VCPU_COUNT,
    MAX_MEMORY_MIB,
    MAX_VCPU_COUNT,
    MIN_MEMORY_MIB,
    MIN_VCPU_COUNT,
)
from atelier.model.warm_pool import MAX_POOL_SIZE
from atelier.schemas.errors import ErrorBody
from atelier.schemas.request_body import RequestBody


class SetWarmPoolRequest(RequestBody):
    """``size`` sandboxes with so many vCPUs and so much memory are to stand ready; 0 drains that pool."""

    size: StrictInt = Field(ge=0, le=MAX_POOL_SIZE)
    vcpu_count: StrictInt = Field(DEFAULT_VCPU_COUNT, ge=MIN_VCPU_COUNT, le=MAX_VCPU_COUNT)
    memory_mib: StrictInt = Field(DEFAULT_MEMORY_MIB, ge=MIN_MEMORY_MIB, le=MAX_MEMORY_MIB)


class WarmPool(BaseModel):
    """``ready`` of ``size`` wait to be taken, ``coming`` are being made. ``failure``: why there are not more, where that is
    known."""

    image: str
    vcpu_count: int
    memory_mib: int
    size: int
    ready: int
    coming: int
    failure: ErrorBody | None = None


class WarmPoolList(BaseModel):
    items: list[WarmPool]
