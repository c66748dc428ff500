"""How much memory this machine has. Source: proc(5), /proc/meminfo."""

from __future__ import annotations

from pathlib import Path


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo in bytes, as ``MemTotal`` or ``MemAvailable``."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise KeyError(field)
