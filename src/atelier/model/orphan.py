"""What bears this installation's name, may be somebody's work, and has no row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OrphanKind(StrEnum):
    """``volume``: a sandbox's disk; ``memory``: that of a paused sandbox; ``snapshot``: all of one."""

    VOLUME = "volume"
    MEMORY = "memory"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, slots=True)
class Orphan:
    """``id``: of the sandbox or snapshot that it was. ``used_bytes``: what it really occupies on disk; as long as another
    disk stands over a snapshot's, removing it frees less."""

    kind: OrphanKind
    id: str
    used_bytes: int
