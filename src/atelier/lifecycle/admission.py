"""Whether the host has room for one more sandbox. Asked inside the transaction that inserts it, so two cannot share
the last place. Knows promised sizes only: what is really used is the drivers' to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from atelier.db.sandboxes import Usage
from atelier.model.errors import CapacityError
from atelier.model.sandbox import SandboxSpec


@dataclass(frozen=True, slots=True)
class Capacity:
    """What all sandboxes of the host together may have; None: not limited."""

    vcpu_count: int | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None


def check_admission(capacity: Capacity, usage: Usage, spec: SandboxSpec) -> None:
    """Raise CapacityError, with what is short and by how much, if ``spec`` does not fit beside what is there."""
    wishes = (
        ("vCPUs", "", capacity.vcpu_count, usage.vcpu_count, spec.vcpu_count),
        ("memory", " MiB", capacity.memory_mib, usage.memory_mib, spec.memory_mib),
        ("disk", " MiB", capacity.disk_mib, usage.disk_mib, spec.disk_mib),
    )
    shortages: list[str] = []
    hopeless = False
    for what, unit, total, used, wanted in wishes:
        if total is None or used + wanted <= total:
            continue
        free = max(0, total - used)
        shortages.append(
            f"{what}: {wanted}{unit} asked for, {free}{unit} of {total}{unit} free, {wanted - free}{unit} short"
        )
        hopeless = hopeless or wanted > total
    if shortages:
        raise CapacityError(
            f"this host has no room for the sandbox ({'; '.join(shortages)})",
            hint="ask for less: this host never has that much"
            if hopeless
            else "remove sandboxes (atelier ls, atelier rm), or ask for less",
        )
