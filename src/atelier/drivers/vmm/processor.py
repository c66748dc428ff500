"""This host's processor, as a saved machine that ran on it directly depends on it. Called by the VMM drivers' stamps."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_SHOWN = ("vendor_id", "cpu family", "model", "stepping", "model name")


def read_processor() -> tuple[str, str]:
    """(model in words, hash of the flags) of the first processor. Source: proc(5), /proc/cpuinfo."""
    first = _CPUINFO.read_text().split("\n\n", 1)[0].splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
    flags = " ".join(sorted(fields.get("flags", "").split()))
    return " ".join(fields.get(name, "?") for name in _SHOWN), hashlib.sha256(flags.encode()).hexdigest()[:16]
