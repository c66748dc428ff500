"""What a virtual machine may take of its host, as values: asked for by VMM drivers, set by whoever is root."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessorAndMemoryLimits:
    """Of all of a VMM's processes and threads together: ``processors`` at full use, ``tasks`` threads."""

    processors: int
    memory_bytes: int
    tasks: int


@dataclass(frozen=True, slots=True)
class DiskRate:
    """Of one machine's root disk, read and written together; None: no limit."""

    bytes_per_second: int | None = None
    operations_per_second: int | None = None

    def __bool__(self) -> bool:
        return self.bytes_per_second is not None or self.operations_per_second is not None


UNLIMITED = DiskRate()
