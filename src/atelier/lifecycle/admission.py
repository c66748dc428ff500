"""Whether the host has room for what is asked for. The room is measured just before, the decision falls inside the
transaction that promises it, against all that was promised by then: so N at once never overshoot.

Called by ``sandboxes``. Promised sizes count in full, used or not; what our own machines and volumes occupy already is
part of the room, since their promises are counted beside it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atelier.db.engine import Database
from atelier.db.sandboxes import SandboxRepository, Usage
from atelier.drivers.network.interface import NetworkDriver
from atelier.drivers.storage.interface import StorageDriver
from atelier.drivers.vmm.interface import VmmDriver
from atelier.model.errors import CapacityError
from atelier.model.sandbox import SandboxSpec

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Capacity:
    """What all sandboxes of the host together may have; None: not limited."""

    vcpu_count: int | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None
    slots: int | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What one operation asks for beyond what was promised before."""

    vcpu_count: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    slots: int = 0

    @classmethod
    def new(cls, spec: SandboxSpec) -> Wish:
        """All that a new sandbox needs."""
        return cls(spec.vcpu_count, spec.memory_mib, spec.disk_mib, slots=1)


@dataclass(frozen=True, slots=True)
class RoomPolicy:
    """How much of the host is for sandboxes. ``memory_available_bytes`` tells what the kernel could give now (None:
    memory is not measured), ``memory_reserve_mib`` stays the host's. ``disk_overcommit``: how many times the real room
    on disk may be promised, since volumes grow only with what is written (None: disk is not measured)."""

    memory_available_bytes: Callable[[], int] | None = None
    memory_reserve_mib: int = 0
    disk_overcommit: float | None = None
    disk_reserve_mib: int = 0
    fixed: Capacity = Capacity()


class HostRoom:
    """Measures what this host has for sandboxes, those that it has included."""

    def __init__(
        self,
        database: Database,
        host_id: str,
        *,
        vmm: VmmDriver,
        storage: StorageDriver,
        network: NetworkDriver,
        policy: RoomPolicy,
    ) -> None:
        self._database = database
        self._sandboxes = SandboxRepository()
        self._host_id = host_id
        self._vmm = vmm
        self._storage = storage
        self._network = network
        self._policy = policy

    async def check(self, *wishes: Wish) -> None:
        """Raise CapacityError if they would not fit now. Nothing is promised by this."""
        capacity = await self.measure()
        with self._database.read() as connection:
            usage = self._sandboxes.sum_usage(connection, self._host_id)
        check_admission(capacity, usage, *wishes)

    async def measure(self) -> Capacity:
        policy, fixed = self._policy, self._policy.fixed
        memory_mib, disk_mib = fixed.memory_mib, fixed.disk_mib
        if policy.memory_available_bytes is not None:
            with self._database.read() as connection:
                machines = self._sandboxes.list_vmm_processes(connection, self._host_id)
            occupied = await self._vmm.resident_bytes(machines)
            room_mib = (policy.memory_available_bytes() + occupied) // _MIB - policy.memory_reserve_mib
            memory_mib = room_mib if memory_mib is None else min(memory_mib, room_mib)
        if policy.disk_overcommit is not None:
            with self._database.read() as connection:
                holders = self._sandboxes.list_volume_holders(connection, self._host_id)
            occupied = sum([await self._storage.used_bytes(sandbox_id) for sandbox_id in holders])
            room_mib = (await self._storage.free_bytes() + occupied) // _MIB - policy.disk_reserve_mib
            room_mib = int(room_mib * policy.disk_overcommit)
            disk_mib = room_mib if disk_mib is None else min(disk_mib, room_mib)
        return Capacity(
            vcpu_count=fixed.vcpu_count,
            memory_mib=None if memory_mib is None else max(0, memory_mib),
            disk_mib=None if disk_mib is None else max(0, disk_mib),
            slots=min((each for each in (fixed.slots, self._network.slot_count) if each is not None), default=None),
        )


def check_admission(capacity: Capacity, usage: Usage, *wishes: Wish) -> None:
    """Raise CapacityError, with what is short and by how much, if ``wishes`` do not fit beside what is promised; of several
    it says how many would."""
    shortages, hopeless = _find_shortages(capacity, usage, wishes)
    if not shortages:
        return
    if len(wishes) > 1:
        # The first number that is too many, by halves: it may be asked for thousands.
        counts = range(len(wishes) + 1)
        fitting = bisect_left(counts, True, key=lambda n: bool(_find_shortages(capacity, usage, wishes[:n])[0])) - 1
        shortages.append(f"{fitting} of the {len(wishes)} would fit")
    hint = "stop or remove sandboxes (atelier ls, stop, rm), or ask for less"
    if hopeless:
        hint = "ask for less: this host does not have that much"
    if any(shortage.startswith("disk") for shortage in shortages):
        hint += "; ATELIER_DISK_OVERCOMMIT lets more disk be promised than there is"
    raise CapacityError(f"this host has no room for it ({'; '.join(shortages)})", hint=hint)


def _find_shortages(capacity: Capacity, usage: Usage, wishes: Sequence[Wish]) -> tuple[list[str], bool]:
    """What is short, in words; and whether one thing is more than there is at all."""
    wants = (
        ("vCPUs", "", capacity.vcpu_count, usage.vcpu_count, sum(wish.vcpu_count for wish in wishes)),
        ("memory", " MiB", capacity.memory_mib, usage.memory_mib, sum(wish.memory_mib for wish in wishes)),
        ("disk", " MiB", capacity.disk_mib, usage.disk_mib, sum(wish.disk_mib for wish in wishes)),
        ("network slots", "", capacity.slots, usage.slots, sum(wish.slots for wish in wishes)),
    )
    shortages: list[str] = []
    hopeless = False
    for what, unit, total, used, wanted in wants:
        if total is None or wanted == 0 or used + wanted <= total:
            continue
        free = max(0, total - used)
        shortages.append(
            f"{what}: {wanted}{unit} asked for, {free}{unit} of {total}{unit} free, {wanted - free}{unit} short"
        )
        hopeless = hopeless or wanted > total
    return shortages, hopeless
