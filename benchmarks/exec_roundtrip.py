"""``exec_roundtrip``: ``/bin/true`` through the API's ``/run``, a process really started each time, against the same
spawn asked for over a raw virtio-serial port."""

from __future__ import annotations

import time

from benchmarks.figure import Figure, at_most, median
from benchmarks.stage import Stage

ROUNDS = 60
_WARM_UP = 5


def measure(stage: Stage) -> list[Figure]:
    client, sandbox, port = stage.client, stage.sandbox, stage.raw_port
    ours: list[float] = []
    bare: list[float] = []
    for number in range(ROUNDS + _WARM_UP):
        began = time.perf_counter()
        client.run(sandbox, "/bin/true")
        between = time.perf_counter()
        if port.ask("spawn") != "0":
            raise RuntimeError("the raw guest could not spawn /bin/true")
        ended = time.perf_counter()
        if number >= _WARM_UP:
            ours.append((between - began) * 1000)
            bare.append((ended - between) * 1000)
    return [Figure("exec_roundtrip", median(ours), "ms", median(bare), at_most(2))]
