"""``slot_delete_50``: 50 of 1,023 network slots given back at once through the driver, until the last is gone, against
50 bare TAPs (on no bridge and under no rules) that are deleted by their group.
"""

from __future__ import annotations

import asyncio
import time

from tests.network_lab import why_no_lab

from benchmarks.crowded_network import CrowdedNetwork
from benchmarks.figure import Figure, at_most, median
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 9
SLOTS = 50
TARGET_MS = 100


def measure(stage: Stage) -> list[Figure]:
    if missing := why_no_lab():
        say(f"slot_delete_50 cannot be measured here: {missing}")
        return []
    ours, bare = asyncio.run(_measure(stage.crowded_network))
    return [Figure("slot_delete_50", median(ours), "ms", median(bare), at_most(TARGET_MS, on="value"))]


async def _measure(network: CrowdedNetwork) -> tuple[list[float], list[float]]:
    ours: list[float] = []
    bare: list[float] = []
    kept = network.free_leases
    for number in range(ROUNDS + 1):
        for lease in network.free_leases:
            await network.take(lease)
        began = time.perf_counter()
        await network.free(list(network.leases)[:SLOTS])
        ours.append((time.perf_counter() - began) * 1000)
        with network.bare() as taps:
            for each in range(SLOTS):
                taps.make(each)
            began = time.perf_counter()
            taps.delete_all()
            bare.append((time.perf_counter() - began) * 1000)
        say(f"slot_delete_50: {ours[-1]:.0f} ms, bare {bare[-1]:.0f} ms")
        if number == 0:
            # Warms up.
            ours.clear()
            bare.clear()
    for lease in network.free_leases:
        if lease not in kept:
            await network.take(lease)
    await network.free([lease for lease in kept if lease in network.leases])
    return ours, bare
