"""``slot_setup``: a network slot (TAP, bridge port, rules, addresses) by the driver while 1,000 others are taken, against
a bare TAP that is made and brought up, on no bridge and under no rules. ``slot_setup_p95`` is the same, 95th percentile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tests.network_lab import why_no_lab

from benchmarks.crowded_network import CrowdedNetwork
from benchmarks.figure import Figure, at_most, median, percentile
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 8
TARGET_MS = 10


def measure(stage: Stage) -> list[Figure]:
    if missing := why_no_lab():
        say(f"slot_setup cannot be measured here: {missing}")
        return []
    ours, bare = asyncio.run(_measure(stage.crowded_network))
    return [
        Figure("slot_setup", median(ours), "ms", median(bare), at_most(TARGET_MS, on="value")),
        Figure("slot_setup_p95", percentile(ours, 95), "ms", percentile(bare, 95)),
    ]


async def _measure(network: CrowdedNetwork) -> tuple[list[float], list[float]]:
    ours: list[float] = []
    bare: list[float] = []
    for number in range(ROUNDS + 1):
        leases = network.free_leases
        with network.bare() as taps:
            bare_round = [_bare(taps.make, lease) for lease in leases]
            taps.delete_all()
        our_round = [await _ours(network, lease) for lease in leases]
        await network.free(leases)
        say(f"slot_setup: {median(our_round):.2f} ms, bare {median(bare_round):.2f} ms")
        if number > 0:
            ours += our_round
            bare += bare_round
    return ours, bare


async def _ours(network: CrowdedNetwork, lease: int) -> float:
    began = time.perf_counter()
    await network.take(lease)
    return (time.perf_counter() - began) * 1000


def _bare(make: Callable[[int], None], number: int) -> float:
    began = time.perf_counter()
    make(number)
    return (time.perf_counter() - began) * 1000
