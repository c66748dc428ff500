"""Sandboxes made ahead of time."""

from __future__ import annotations

from dataclasses import dataclass

MAX_POOL_SIZE = 256


@dataclass(frozen=True, slots=True)
class WarmPool:
    """``size`` sandboxes of this image and these sizes are to stand ready; 0: the pool is drained."""

    image: str
    vcpu_count: int
    memory_mib: int
    size: int
