"""``create_cold``: from asking for a sandbox to the first ``true`` answered in it, against bare QEMU to the same point.

Both sides: same kernel, initramfs, tools image with the guest agent, overlay over the same base, QEMU options.
"""

from __future__ import annotations

import time

from benchmarks.bare_machine import bare_machine
from benchmarks.direct_channel import DirectChannel
from benchmarks.figure import Figure, at_most, median
from benchmarks.progress import say
from benchmarks.stage import Stage

ROUNDS = 7


def measure(stage: Stage) -> list[Figure]:
    ours: list[float] = []
    bare: list[float] = []
    for number in range(ROUNDS + 1):
        bare_seconds = _bare(stage, number)
        our_seconds = stage.client.time_first_answer(f"cold-{number}")
        say(f"create_cold: {our_seconds:.2f} s, bare {bare_seconds:.2f} s")
        if number > 0:
            # The first round warms caches up on both sides.
            ours.append(our_seconds)
            bare.append(bare_seconds)
    return [Figure("create_cold", median(ours), "s", median(bare), at_most(1.15))]


def _bare(stage: Stage, number: int) -> float:
    ingredients = stage.ingredients
    began = time.perf_counter()
    with bare_machine(stage.folder / f"c{number}", ingredients) as machine:
        channel = DirectChannel(machine.folder.guest_socket, token="")
        channel.run("/bin/true")
        seconds = time.perf_counter() - began
        channel.close()
    return seconds
